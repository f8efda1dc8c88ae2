from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from hymba_tune.errors import ConfigError
from hymba_tune.files import atomic_write, write_text


def test_text_replaces_text_and_nothing_else_is_touched(tmp_path: Path) -> None:
    for name in ("page.partial", ".page.part", "page.0000000g.partial"):
        (tmp_path / name).write_text("somebody else's")
    for text in ("one", "two"):
        write_text(tmp_path / "page", text)
        assert (tmp_path / "page").read_text() == text
    others = [path for path in tmp_path.iterdir() if path.name != "page"]
    assert [path.read_text() for path in others] == ["somebody else's"] * 3


def test_two_writers_of_one_file_do_not_mix(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "file") as one, atomic_write(tmp_path / "file") as two:
        assert one != two
        one.write_text("one")
        two.write_text("two")
    assert (tmp_path / "file").read_text() == "one"  # the outer block ended last
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, FileExistsError])
def test_error_leaves_the_old_file(error: type[BaseException], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")

    def fail() -> None:
        with atomic_write(tmp_path / "file") as part:
            part.write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert (tmp_path / "file").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_content_reaches_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[tuple[str, int]] = []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(descriptor: int) -> None:
        events.append(("flushed", os.fstat(descriptor).st_ino))
        fsync(descriptor)

    def noted_replace(self: Path, target: Any) -> Path:
        events.append(("renamed", self.stat().st_ino))
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    write_text(tmp_path / "file", "text")
    file, folder = (path.stat().st_ino for path in (tmp_path / "file", tmp_path))
    assert events == [("flushed", file), ("renamed", file), ("flushed", folder)]


def test_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/real").write_text("old")
    (tmp_path / "link").symlink_to("elsewhere/real")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "elsewhere/real").read_text() == "new"


@pytest.mark.parametrize("has_links", [True, False])
def test_file_that_appears_meanwhile_is_kept_and_so_is_what_was_written(
    has_links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError

    if not has_links:
        monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "file"
    write_text(path, "first", overwrite=False)
    with pytest.raises(ConfigError, match=r"was created by something else while.*\n.*then rename .*complete"):
        write_text(path, "second", overwrite=False)
    assert path.read_text() == "first"
    (part,) = (other for other in tmp_path.iterdir() if other != path)
    assert part.read_text() == "second"

from __future__ import annotations

import errno
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from hymba_tune.errors import ConfigError
from hymba_tune.files import (
    RUN,
    atomic_folder,
    atomic_write,
    check_new_folder,
    folders,
    make_folders,
    new_folder,
    remove_empty,
    replacing,
    seal,
)


def write(out: Path, error: BaseException | None = None, *, overwrite: bool = False, text: str = "all of it") -> None:
    with new_folder(out, overwrite=overwrite) as folder:
        (folder / "file").write_text(text)
        assert not (out / "file").exists()
        if error is not None:
            raise error


def save_model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "hymba"}')
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_folder_takes_its_name_at_the_end(tmp_path: Path) -> None:
    write(tmp_path / "deep/out")
    assert names(tmp_path / "deep") == ["out"]
    assert (tmp_path / "deep/out/file").read_text() == "all of it"


@pytest.mark.skipif(os.name != "posix", reason="only POSIX has modes of files")
@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_files_are_as_readable_as_others_that_the_user_writes(
    mask: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Safetensors writes files that only their owner may read."""
    request.addfinalizer(partial(os.umask, os.umask(mask)))
    tensors = {"a": np.zeros(3)}
    with atomic_folder(tmp_path / "folder") as folder:
        save_file(tensors, folder / "a.safetensors")
        (folder / "text").write_text("plain")
    with atomic_write(tmp_path / "b.safetensors") as part:
        save_file(tensors, part)
    (tmp_path / "checkpoint").mkdir()
    save_file(tensors, tmp_path / "checkpoint/c.safetensors")
    seal(tmp_path / "checkpoint")
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    assert len(modes) == 5
    assert set(modes.values()) == {0o666 & ~mask}, modes


def test_folders_that_look_like_ours_are_left_alone(tmp_path: Path) -> None:
    for name in ("out.partial", "out.0000000g.partial", ".out.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").touch()
    write(tmp_path / "out")
    assert len(list(tmp_path.glob("*/mine")) + list(tmp_path.glob(".*/mine"))) >= 3
    assert len(names(tmp_path)) == 4


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("no")])
def test_nothing_is_left_of_one_that_was_not_finished(error: BaseException, tmp_path: Path) -> None:
    with pytest.raises(type(error)):
        write(tmp_path / "deep/out", error)
    assert not list(tmp_path.iterdir())
    (tmp_path / "deep").mkdir()
    with pytest.raises(type(error)):
        write(tmp_path / "deep/out", error)
    assert names(tmp_path) == ["deep"]  # which was there


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), RuntimeError("I/O error: (os error 28)")])
def test_full_disk(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--out .*out: its disk is full\.\n  to fix     free some space"):
        write(tmp_path / "out", error)
    assert not list(tmp_path.iterdir())


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--out .*file/out cannot be written: Not a directory\.\n.*another --out"):
        write(tmp_path / "file/out")


@pytest.mark.parametrize("error", [None, ValueError("no")])
def test_model_is_replaced_only_by_a_complete_one(error: Exception | None, tmp_path: Path) -> None:
    out = save_model(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"exists and is not empty\.\n.*\n  to fix     another --out, or --overwrite"):
        write(out)
    if error is None:
        write(out, overwrite=True)
    else:
        with pytest.raises(ValueError, match="no"):
            write(out, error, overwrite=True)
    assert names(out) == (["file"] if error is None else ["config.json"])
    assert names(tmp_path) == ["out"]


def test_old_model_comes_back_where_the_new_one_cannot_take_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, rename = save_model(tmp_path / "out"), Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if (self / "file").exists():
            raise PermissionError
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(PermissionError):
        write(out, overwrite=True)
    assert names(tmp_path) == ["out"]
    assert names(out) == ["config.json"]


def test_folder_that_fills_meanwhile_is_kept_and_so_is_what_was_written(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def interleaved() -> None:
        with new_folder(out) as folder:
            (folder / "file").write_text("first")
            write(out, text="second")

    with pytest.raises(ConfigError, match=r"was filled by something else while it(.|\n)*rename .*out\..*complete"):
        interleaved()
    assert (out / "file").read_text() == "second"
    (part,) = tmp_path.glob("out.*.complete")
    assert (part / "file").read_text() == "first"


def test_link_to_a_folder_stays(tmp_path: Path) -> None:
    save_model(tmp_path / "elsewhere/real")
    (tmp_path / "out").symlink_to("elsewhere/real")
    write(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out").is_symlink()
    assert names(tmp_path / "elsewhere/real") == ["file"]


def test_current_folder_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here/below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here/below")
    for out in (Path(), Path(".."), tmp_path):
        with pytest.raises(ConfigError, match="is or contains the current folder"):
            write(out)


def test_check_leaves_nothing(tmp_path: Path) -> None:
    check_new_folder(tmp_path / "deep/out")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written: Not a directory"):
        check_new_folder(tmp_path / "file/out")


def test_atomic_folder_replaces_what_is_there(tmp_path: Path) -> None:
    for text in ("one", "two"):
        with atomic_folder(tmp_path / "out") as folder:
            (folder / text).touch()
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["two"]


def test_folder_reaches_the_disk_before_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[Path] = []
    monkeypatch.setattr(folders, "flush_to_disk", lambda path: flushed.append(path) or (tmp_path / "out").exists())
    write(tmp_path / "out")
    assert [path.name.split(".")[0] for path in flushed] == ["out", tmp_path.name]


@pytest.mark.parametrize("how", ["ends", "fails", "fails after it started"])
def test_replaced_content_comes_back_unless_the_new_one_started(how: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("old")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / ".lock").touch()

    def fill() -> None:
        with replacing(tmp_path, RUN, (tmp_path / "metrics.jsonl").exists):
            assert sorted(names(tmp_path))[0] == ".lock"
            assert not (tmp_path / "run.json").exists()
            (tmp_path / "run.json").write_text("new")
            (tmp_path / "notes").write_text("somebody else's")
            if how == "fails after it started":
                (tmp_path / "metrics.jsonl").touch()
            if how != "ends":
                raise KeyboardInterrupt

    if how == "ends":
        fill()
    else:
        with pytest.raises(KeyboardInterrupt):
            fill()
    old = how == "fails"
    assert (tmp_path / "run.json").read_text() == ("old" if old else "new")
    assert (tmp_path / "checkpoints").exists() == old
    assert (tmp_path / "notes").read_text() == "somebody else's"
    assert not list(tmp_path.glob("replaced.*"))


def test_only_folders_that_were_made_are_removed(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    made = make_folders(tmp_path / "old/new/er")
    assert made == [tmp_path / "old/new/er", tmp_path / "old/new"]
    assert make_folders(tmp_path / "old/new/er") == []
    (tmp_path / "old/new/file").touch()
    remove_empty(made)
    assert names(tmp_path / "old/new") == ["file"]
    with pytest.raises(NotADirectoryError, match="new/file"):
        make_folders(tmp_path / "old/new/file")
    assert names(tmp_path) == ["old"]

"""What killed processes leave goes with the next command, and what living ones write does not."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest

from hymba_tune.errors import ConfigError
from hymba_tune.files import atomic_folder, atomic_write, new_folder, remove_leftovers, write_text
from hymba_tune.files.leftovers import held, left_behind

LEFT = ("file.0123abcd.partial", "file.00000000.partial")
OTHERS = ("file.partial", "file.0123abc.partial", "file.0123abcg.partial", "other.0123abcd.partial")


def test_leftovers_of_a_file_go_and_nothing_else(tmp_path: Path) -> None:
    for name in (*LEFT, *OTHERS):
        (tmp_path / name).write_text("x")
    write_text(tmp_path / "file", "new")
    assert {path.name for path in tmp_path.iterdir()} == {"file", *OTHERS}


def test_leftovers_of_a_folder_go(tmp_path: Path) -> None:
    for name in LEFT:
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("x")
    with atomic_folder(tmp_path / "file") as folder:
        (folder / "whole").write_text("x")
    assert {path.name for path in tmp_path.iterdir()} == {"file"}


def test_what_a_living_process_writes_stays(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "file") as part, new_folder(tmp_path / "folder") as folder:
        remove_leftovers(tmp_path / "file", tmp_path / "folder")
        assert part.is_file()
        assert folder.is_dir()
        assert left_behind(tmp_path / "file") == left_behind(tmp_path / "folder") == []


def test_old_folder_comes_back_after_a_kill_between_two_renames(tmp_path: Path) -> None:
    old = tmp_path / "model.0123abcd.old"
    old.mkdir()
    (old / "config.json").write_text('{"model_type": "hymba"}')
    (tmp_path / "model.0123abcd.partial").mkdir()
    with pytest.raises(ConfigError, match=r"exists and is not empty"), new_folder(tmp_path / "model"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model/config.json").is_file()


def test_old_folder_goes_once_the_new_one_has_its_name(tmp_path: Path) -> None:
    for name in ("model.0123abcd.old", "model"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(f'{{"model_type": "hymba", "is": "{name}"}}')
    with new_folder(tmp_path / "model", overwrite=True) as folder:
        (folder / "new").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["new"]


@pytest.mark.parametrize("named", [names for count in range(4) for names in combinations("abc", count)])
def test_files_of_one_command_that_was_killed_while_naming_them(named: tuple[str, ...], tmp_path: Path) -> None:
    """Of three files some have their names: unless all do, they go, and the command can be run again."""
    for name in "abc":
        (tmp_path / (name if name in named else f"{name}.0123abcd.partial")).write_text("new")
    remove_leftovers(*(tmp_path / name for name in "abc"))
    assert {path.name for path in tmp_path.iterdir()} == (set("abc") if len(named) == 3 else set())


def test_file_with_both_names_has_its_name(tmp_path: Path) -> None:
    for name in ("a.0123abcd.partial", "b.0123abcd.partial"):
        (tmp_path / name).write_text("x")
    (tmp_path / "a").hardlink_to(tmp_path / "a.0123abcd.partial")
    remove_leftovers(tmp_path / "a", tmp_path / "b")
    assert not list(tmp_path.iterdir())


def test_earlier_files_stay_if_a_command_was_killed_before_naming_its_own(tmp_path: Path) -> None:
    for name in ("a", "a.0123abcd.partial", "b.0123abcd.partial"):
        (tmp_path / name).write_text("x")
    remove_leftovers(tmp_path / "a", tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_file_systems_without_locks_and_folders_that_are_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / LEFT[0]).write_text("x")

    def refuse(*_: object) -> None:
        raise OSError("no locks")

    monkeypatch.setattr("hymba_tune.files.leftovers.fcntl.flock", refuse)
    with held(tmp_path):
        remove_leftovers(tmp_path / "file", tmp_path / "nowhere/file")
    assert [path.name for path in tmp_path.iterdir()] == [LEFT[0]]

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from hymba_tune.errors import ConfigError
from hymba_tune.folders import new_folder


def write(out: Path, error: BaseException | None = None) -> None:
    with new_folder(out) as folder:
        (folder / "file").write_text("all of it")
        assert not (out / "file").exists()
        if error is not None:
            raise error


def test_folder_takes_its_name_at_the_end(tmp_path: Path) -> None:
    write(tmp_path / "deep/out")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    assert (tmp_path / "deep/out/file").read_text() == "all of it"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("no")])
def test_nothing_is_left_of_one_that_was_not_finished(error: BaseException, tmp_path: Path) -> None:
    with pytest.raises(type(error)):
        write(tmp_path / "out", error)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), RuntimeError("I/O error: (os error 28)")])
def test_full_disk(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--out .*out: its disk is full\.\n  to fix     free some space"):
        write(tmp_path / "out", error)
    assert not list(tmp_path.iterdir())


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--out .*file/out cannot be written: Not a directory\.\n.*another --out"):
        write(tmp_path / "file/out")

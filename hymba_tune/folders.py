"""Folders that are there in full or not at all."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hymba_tune.errors import ConfigError

FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, aside: it takes its name when the block within ends well, and is gone if it does not.

    Enter it before anything that takes long, so that a folder that cannot be written is told at once.

    Args:
        out: What it is to be called; must not exist or be empty.

    Raises:
        ConfigError: If it holds something already or cannot be written, or its disk is full.
    """
    partial = _begin(out)
    try:
        yield partial
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if (isinstance(error, OSError) and error.errno in FULL) or "os error 28" in str(error):  # safetensors' words
            raise ConfigError(f"--out {out}: its disk is full.", fix="free some space, or another --out") from error
        raise


def check_new_folder(out: Path) -> None:
    """See that `new_folder` could begin, where that is long after; errors are the same."""
    _begin(out).rmdir()


def _begin(out: Path) -> Path:
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise ConfigError(f"--out {out} exists and is not empty.", expected="a new or empty folder")
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error.strerror}.", fix="another --out") from error
    return partial

"""Checkpoints that are known to be whole, whatever moment the run before was killed at."""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path

from hymba_tune.files import flush_to_disk, write_text

WHOLE = "whole"
"""File that a checkpoint gets last, with the size and the checksum of every other: what it lists, and only that, is
known to have been written to its end."""
BLOCK = 2**20  # bytes read at a time


def seal(folder: Path) -> None:
    """Mark a checkpoint as whole, once all of it is on the disk."""
    files = {path.relative_to(folder).as_posix(): _mark(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    files.pop(WHOLE, None)  # of a checkpoint that lay there before
    write_text(folder / WHOLE, json.dumps(files, indent=1) + "\n")


def is_whole(folder: Path) -> bool:
    """Whether every file of a checkpoint is there as it was when the checkpoint was sealed."""
    try:
        files = json.loads((folder / WHOLE).read_text(encoding="utf-8"))
        # Sizes first: what was cut short is seen without reading gigabytes.
        same_sizes = all((folder / name).stat().st_size == mark["bytes"] for name, mark in files.items())
        return bool(files) and same_sizes and all(_crc32(folder / name) == files[name]["crc32"] for name in files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def step_of(checkpoint: Path) -> int:
    """The optimizer step a checkpoint was written after."""
    return int(checkpoint.name.rpartition("-")[2])


def newest_whole(folder: Path) -> Path | None:
    """The newest whole checkpoint of a folder; those behind it are not read."""
    newest_first = sorted(folder.glob("checkpoint-*"), key=step_of, reverse=True)
    return next((path for path in newest_first if is_whole(path)), None)


def forget_torn(folder: Path) -> None:
    """Remove the checkpoints of a folder that are not whole, so that none is kept in place of a whole one."""
    for path in folder.glob("checkpoint-*"):
        if not is_whole(path):
            shutil.rmtree(path, ignore_errors=True)


def _mark(path: Path) -> dict[str, int]:
    flush_to_disk(path)
    return {"bytes": path.stat().st_size, "crc32": _crc32(path)}


def _crc32(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            checksum = zlib.crc32(block, checksum)
    return checksum

"""Sealed checkpoints: those known to be complete, at whatever moment a run was killed."""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path

from hymba_tune.files import flush_to_disk, write_text

WHOLE = "whole"
"""The file written last into a checkpoint, with the size and the checksum of every other file. Only files that it lists
are known to be complete."""
BLOCK = 2**20  # bytes read at a time


def seal(folder: Path) -> None:
    """Mark a checkpoint as complete, once all of it is on the disk."""
    files = {path.relative_to(folder).as_posix(): _mark(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    files.pop(WHOLE, None)  # from an earlier checkpoint in the same folder
    write_text(folder / WHOLE, json.dumps(files, indent=1) + "\n")


def is_whole(folder: Path) -> bool:
    """Return whether every file of a checkpoint is as it was when the checkpoint was sealed."""
    try:
        files = json.loads((folder / WHOLE).read_text(encoding="utf-8"))
        # Sizes first: they show a truncated file without reading gigabytes.
        same_sizes = all((folder / name).stat().st_size == mark["bytes"] for name, mark in files.items())
        return bool(files) and same_sizes and all(_crc32(folder / name) == files[name]["crc32"] for name in files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def step_of(checkpoint: Path) -> int:
    """Return the optimizer step after which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def newest_whole(folder: Path) -> Path | None:
    """Return the newest complete checkpoint of a folder; older ones are not read."""
    newest_first = sorted(folder.glob("checkpoint-*"), key=step_of, reverse=True)
    return next((path for path in newest_first if is_whole(path)), None)


def forget_torn(folder: Path) -> None:
    """Remove incomplete checkpoints, so that none of them counts towards the limit on saved checkpoints."""
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

"""Sealed folders: those whose files are known to be complete and unchanged, by their sizes and checksums."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

from hymba_tune.files.writing import flush_to_disk, share_files, write_text

WHOLE = "whole"
"""The file written last into a folder, with the size and the checksum of every other file. Only files that it lists are
known to be complete."""
BLOCK = 2**20  # bytes read at a time


def seal(folder: Path) -> None:
    """Mark a folder as complete, once all of it is on the disk."""
    share_files(folder)
    files = {path.relative_to(folder).as_posix(): _mark(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    files.pop(WHOLE, None)  # from an earlier seal of the same folder
    write_text(folder / WHOLE, json.dumps(files, indent=1) + "\n")


def is_whole(folder: Path) -> bool:
    """Return whether every file of a folder is as it was when the folder was sealed."""
    try:
        files = json.loads((folder / WHOLE).read_text(encoding="utf-8"))
        # Sizes first: they show a truncated file without reading gigabytes.
        same_sizes = all((folder / name).stat().st_size == mark["bytes"] for name, mark in files.items())
        return bool(files) and same_sizes and all(_crc32(folder / name) == files[name]["crc32"] for name in files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _mark(path: Path) -> dict[str, int]:
    flush_to_disk(path)
    return {"bytes": path.stat().st_size, "crc32": _crc32(path)}


def _crc32(path: Path) -> int:
    found = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            found = zlib.crc32(block, found)
    return found

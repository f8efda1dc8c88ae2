"""The cache of compiled libraries. They run code as the user, so only files that the user wrote are loaded."""

from __future__ import annotations

import atexit
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH if os.name == "posix" else 0
"""Bits of a file's mode. Windows sets them for every file that is not read-only; its users' folders are their own."""


def cache_folder() -> Path:
    """Return a folder that only the user can enter: in the user's cache, or else a temporary one, removed at exit."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "hymba-tune", "native")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if is_own(folder.stat()):
            folder.chmod(0o700)
            tempfile.TemporaryFile(dir=folder).close()
            return folder
    except (OSError, RuntimeError):  # RuntimeError: there is no home directory
        pass
    folder = Path(tempfile.mkdtemp(prefix="hymba-tune-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def find_libraries(folder: Path, stem: str) -> Iterator[Path]:
    """Yield the libraries of a name that the user wrote and whose content is the one that their names tell."""
    for path in sorted(folder.glob(f"{stem}-*.so")):
        status = path.lstat()
        private = stat.S_ISREG(status.st_mode) and is_own(status) and not status.st_mode & WRITABLE_BY_OTHERS
        if private and path.name == _name(stem, path):
            yield path


def store_library(built: Path, folder: Path, stem: str) -> Path:
    """Move a new library into the cache, under a name that contains its digest."""
    built.chmod(0o700)
    with built.open("rb+") as file:
        os.fsync(file.fileno())  # otherwise a crash could leave a truncated library
    return built.replace(folder / _name(stem, built))


def is_own(status: os.stat_result) -> bool:
    """Return whether a file or folder belongs to the user of this process."""
    return not hasattr(os, "geteuid") or status.st_uid == os.geteuid()  # Windows has no owners of this kind


def _name(stem: str, path: Path) -> str:
    return f"{stem}-{hashlib.sha256(path.read_bytes()).hexdigest()[:32]}.so"

"""Folders that exist in full or not at all, and folders whose old content comes back if the new one fails."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from hymba_tune.errors import ConfigError
from hymba_tune.files.kinds import MODEL, REPLACED, FolderKind, entries, remove
from hymba_tune.files.leftovers import held, left_behind, remove_leftovers
from hymba_tune.files.outputs import check_folder, check_not_current, disk_errors, write_errors
from hymba_tune.files.writing import COMPLETE, aside, flush_to_disk, share_files

OLD = ".old"
"""Ending of the name aside of a folder that is being replaced."""


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder to write into; it takes its place when the block ends without an error.

    Args:
        path: The folder. One that is there is replaced, and removed once the new one is in its place.

    Raises:
        OSError: If it cannot be written.
    """
    target = Path(os.path.realpath(path))
    _recover(target)
    part = aside(target)
    part.mkdir()
    with _becoming(part, target, overwrite=True):
        yield part


@contextmanager
def new_folder(out: Path, *, overwrite: bool = False, inputs: Iterable[Path] = ()) -> Iterator[Path]:
    """Yield a folder to write a model into; it becomes ``--out`` when the block ends without an error.

    Enter it before anything that takes long, so that a folder that cannot be written is known at once.

    Args:
        out: The folder of the model.
        overwrite: Whether a folder that holds a model is replaced, once the new one is complete.
        inputs: Files and folders that the command reads; see `check_folder`.

    Raises:
        ConfigError: If the folder must not or cannot be written, or its disk is full. Also if something else put files
            there during the block; what was written is then kept aside.
    """
    check_not_current(out)
    _recover(Path(os.path.realpath(out)))
    check_folder(out, MODEL, overwrite=overwrite, inputs=inputs)
    target = Path(os.path.realpath(out))
    made: list[Path] = []
    try:
        with write_errors("--out", out):
            made = make_folders(target.parent)
            part = aside(target)
            part.mkdir()
        with disk_errors("--out", out), _becoming(part, target, overwrite=overwrite):
            yield part
    finally:
        remove_empty(made)


def check_new_folder(out: Path, *, overwrite: bool = False, inputs: Iterable[Path] = ()) -> None:
    """Check that `new_folder` can begin, where that is much later; arguments and errors are the same."""
    with suppress(_UnusedError), new_folder(out, overwrite=overwrite, inputs=inputs):
        raise _UnusedError


class _UnusedError(Exception):
    """Leaves a new folder without putting it in its place."""


@contextmanager
def _becoming(part: Path, target: Path, *, overwrite: bool) -> Iterator[None]:
    """Rename a folder when the block ends without an error, and remove it otherwise."""
    old = aside(target, OLD)
    with ExitStack() as held_folders:
        held_folders.enter_context(held(part))
        try:
            yield
            share_files(part)
            flush_to_disk(part)
            if target.exists():
                held_folders.enter_context(held(target))
                target.rename(old)
            if overwrite or not any(entries(old)):
                part.rename(target)
                flush_to_disk(target.parent)
        except BaseException:
            remove(part)
            raise
        finally:
            if old.exists() and not target.exists():
                old.rename(target)
        if part.exists():
            kept = part.rename(aside(target, COMPLETE))
            raise ConfigError(
                f"{target} was filled by something else while it was being written.",
                fix=f"move that away, then rename {kept}, which holds all that was written",
            )
        remove(old)


def _recover(target: Path) -> None:
    """Restore or remove what killed processes have left of a folder.

    A process that was killed between two renames has left the old folder, whole, under a name aside.
    """
    remove_leftovers(target)
    for old in left_behind(target, OLD):
        if target.exists():
            remove(old)
        else:
            old.rename(target)


@contextmanager
def replacing(folder: Path, kind: FolderKind, started: Callable[[], bool]) -> Iterator[None]:
    """Fill a folder anew, in place. What it held is moved into a subfolder, and is removed at the end.

    If the block fails before the new content has ``started`` to be of use, the old content is restored instead.

    Args:
        folder: The folder, empty or of ``kind``, and locked by this process.
        kind: What it holds; nothing else is removed from it.
        started: Says whether what the block has written is worth keeping.
    """
    old = folder / f"{REPLACED}.{secrets.token_hex(4)}"
    if before := list(entries(folder)):
        old.mkdir()
    for path in before:
        path.rename(old / path.name)
    try:
        yield
    except BaseException:
        if not started():
            kind.clear(folder, keep=old)
            for path in entries(old):
                path.rename(folder / path.name)
        remove(old)
        raise
    remove(old)


def make_folders(folder: Path) -> list[Path]:
    """Create a folder and those above it.

    Returns:
        The ones that were not there before, the innermost first.

    Raises:
        OSError: If it cannot be created.
    """
    made: list[Path] = []
    for path in reversed((folder, *folder.parents)):
        if not path.is_dir():
            try:
                path.mkdir()
                made.insert(0, path)
            except FileExistsError:
                if not path.is_dir():  # another process would have been faster
                    raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)) from None
    return made


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove folders as long as they are empty, the first one first."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()

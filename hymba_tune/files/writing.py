"""Files that exist in full or not at all, even after a loss of power."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hymba_tune.errors import ConfigError
from hymba_tune.files.leftovers import held, remove_leftovers

PARTIAL, COMPLETE = ".partial", ".complete"
"""Endings of names that are written to before the result takes its place, and of a result whose place is taken."""


def aside(path: Path, ending: str = PARTIAL) -> Path:
    """Return a new, unique name beside a path: ``model.json`` gives ``model.json.1f0c9a2e.partial``."""
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}{ending}")


@contextmanager
def atomic_write(path: Path, *, overwrite: bool = True, alone: bool = True) -> Iterator[Path]:
    """Yield a file to write; it takes its place when the block ends without an error, and is removed otherwise.

    Args:
        path: The file. A link to a file stays, and that file is replaced.
        overwrite: Whether a file that is there by then is replaced.
        alone: Whether no process of another machine writes it: what killed processes have left of it is then removed.

    Raises:
        ConfigError: If ``overwrite`` is off and ``path`` was created during the block; what was written is kept aside.
        OSError: If it cannot be written.
    """
    if alone:
        remove_leftovers(path)
    part = aside(Path(os.path.realpath(path)))
    part.touch()
    mode = part.stat().st_mode
    with held(part):
        try:
            yield part
            part.chmod(mode)  # as in `share_files`
            put_in_place(part, path, overwrite=overwrite)
        except NameTakenError:  # all was written, and is kept
            raise
        except BaseException:
            part.unlink(missing_ok=True)
            raise


class NameTakenError(ConfigError):
    """A file that was written aside cannot take its name, because something else took it first."""


def put_in_place(part: Path, path: Path, *, overwrite: bool = True) -> None:
    """Give a file that was written aside its name, once all of it is on the disk.

    Args:
        part: The file, in the folder of ``path``.
        path: The name.
        overwrite: Whether a file of that name is replaced.

    Raises:
        NameTakenError: If it is not, and there is one.
        OSError: If it cannot be renamed.
    """
    target = Path(os.path.realpath(path))
    _flush(part)
    if overwrite:
        part.replace(target)
    else:
        try:
            os.link(part, target)  # unlike a rename, it never replaces
            part.unlink()
        except OSError as error:
            if target.exists():
                kept = part.rename(aside(target, COMPLETE)) if part.suffix == PARTIAL else part
                raise NameTakenError(
                    f"{path} was created by something else while it was being written.",
                    fix=f"move it away, then rename {kept}, which holds all that was written",
                ) from error
            part.rename(target)  # a file system without hard links
    _flush(target.parent)


def write_text(path: Path, text: str, *, overwrite: bool = True) -> None:
    """Write a text file in UTF-8; see `atomic_write`."""
    with atomic_write(path, overwrite=overwrite) as part:
        part.write_text(text, encoding="utf-8")


def share_files(folder: Path) -> None:
    """Let everybody read the files in a folder who may read the folder: safetensors lets only their owner read them."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


def flush_to_disk(path: Path) -> None:
    """Wait until a file, or everything in a folder, would survive a loss of power."""
    if path.is_dir():
        for below in path.rglob("*"):
            _flush(below)
    _flush(path)


def _flush(path: Path) -> None:
    if os.name != "posix" and path.is_dir():
        return  # Windows cannot open folders
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError:
        if path.is_file():  # some file systems cannot do it for folders
            raise
    finally:
        os.close(descriptor)

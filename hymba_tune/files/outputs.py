"""Checks of the files and folders that a command is to write, before it does anything else."""

from __future__ import annotations

import errno
import os
import shlex
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hymba_tune.errors import ConfigError
from hymba_tune.files.kinds import MODEL, RUN, FolderKind, entries
from hymba_tune.files.leftovers import remove_leftovers

FULL = (errno.ENOSPC, errno.EDQUOT)
OVERWRITE = "another name, or --overwrite to replace it"


def check_file(flag: str, path: Path, *, overwrite: bool = False, inputs: Iterable[Path] = ()) -> None:
    """Check that a file can be written without destroying anything, and remove what killed processes have left of it.

    Args:
        flag: The flag that named it.
        path: The file.
        overwrite: Whether it may replace a file.
        inputs: What the command reads. The file must be none of these, under whatever name, nor lie inside one.

    Raises:
        ConfigError: If it is an input, part of a run or of a model, exists, or cannot be created.
    """
    output = f"{flag} {path}"
    if _input_of(path, inputs):
        raise ConfigError(f"{output} is an input of this command, which would be overwritten.", fix="another name")
    if (owner := _owner(path)) is not None:
        raise ConfigError(f"{output} is a part of {owner[0].name}, {owner[1]}.", fix="another name")
    if path.exists() and not path.is_file():
        raise ConfigError(f"{output} is not a file.", expected="the name of a file")
    remove_leftovers(path)
    if os.path.lexists(path) and not overwrite:
        raise ConfigError(f"{output} exists.", fix=OVERWRITE)
    if not path.parent.is_dir():
        raise ConfigError(
            f"{output}: there is no folder {path.parent}.", fix=f"mkdir -p {shlex.quote(str(path.parent))}"
        )


def check_folder(
    out: Path,
    kind: FolderKind,
    *,
    flag: str = "--out",
    overwrite: bool = False,
    inputs: Iterable[Path] = (),
    fix: str = "",
) -> None:
    """Check that a folder can be written without destroying anything.

    Args:
        out: The folder.
        kind: What it is to be.
        flag: The flag that named it.
        overwrite: Whether it may replace a folder of that kind.
        inputs: What the command reads. A folder that is replaced must neither be one of these nor contain one.
        fix: What the user can do if the folder exists, beyond the usual.

    Raises:
        ConfigError: If it is a file, part of a run, or exists and must not be replaced.
    """
    if (owner := _owner(out, RUN)) is not None:
        raise ConfigError(f"{flag} {out} is a part of a run, {owner[1]}.", fix=f"another {flag}")
    if os.path.lexists(out) and not out.is_dir():
        what = "a file" if out.exists() else "a link to a folder that is not there"
        raise ConfigError(f"{flag} {out} is {what}.", expected="a new or empty directory")
    if not any(entries(out)):
        return
    if not overwrite:
        raise ConfigError(
            f"{flag} {out} exists and is not empty.",
            expected="a new or empty folder",
            fix=f"{fix}another {flag}, or --overwrite to replace it",
        )
    here = Path(os.path.realpath(out))
    for path in inputs:
        if here in (real := Path(os.path.realpath(path)), *real.parents):
            raise ConfigError(
                f"--overwrite {flag} {out} would remove {path}, an input of this command.", fix=f"another {flag}"
            )
    check_not_current(out)
    if (why := kind.refusal_reason(out)) is not None:
        raise ConfigError(
            f"--overwrite {flag} {out}: this is not {kind.name} of hymba-tune: {why}.",
            expected=f"{kind.name}, and nothing else in its folder",
            fix=f"another {flag}, or move it away",
        )


def check_not_current(out: Path) -> None:
    """Check that a folder can be replaced without removing the current one.

    Raises:
        ConfigError: If it is or contains the current folder.
    """
    current = Path.cwd().resolve()
    if Path(os.path.realpath(out)) in (current, *current.parents):
        raise ConfigError(f"--out {out} is or contains the current folder.", fix="another --out")


@contextmanager
def write_errors(flag: str, path: Path) -> Iterator[None]:
    """Explain why something cannot be written.

    Raises:
        ConfigError: Instead of the system's errors.
    """
    with disk_errors(flag, path):
        try:
            yield
        except OSError as error:
            if error.errno in FULL:
                raise
            what = f"{flag} {path} cannot be written: {error.strerror or error}."
            raise ConfigError(what, fix=f"another {flag}") from error


@contextmanager
def disk_errors(flag: str, path: Path) -> Iterator[None]:
    """Explain that a disk is full.

    Raises:
        ConfigError: Instead of the system's errors and of safetensors'.
    """
    try:
        yield
    except Exception as error:
        if (isinstance(error, OSError) and error.errno in FULL) or "os error 28" in str(error):  # as safetensors says
            raise ConfigError(f"{flag} {path}: its disk is full.", fix=f"free some space, or another {flag}") from error
        raise


def _input_of(path: Path, inputs: Iterable[Path]) -> bool:
    """Whether a file is an input: the same file under any name, or inside a folder that is one."""
    if not path.exists():
        return False
    above = Path(os.path.realpath(path)).parents
    known = [each for each in inputs if each.exists()]
    return any(path.samefile(each) or (each.is_dir() and each.resolve() in above) for each in known)


def _owner(path: Path, *kinds: FolderKind) -> tuple[FolderKind, Path] | None:
    """The run or model that a path is a part of, whether or not it exists yet."""
    real = Path(os.path.realpath(path))
    for part, folder in zip((real, *real.parents), real.parents, strict=False):
        for kind in kinds or (RUN, MODEL):
            if kind.has_part(part.name) and kind.is_one(folder):
                return kind, folder
    return None

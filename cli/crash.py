"""What remains of an error that nobody expected: a file with everything that a report of it needs."""

from __future__ import annotations

import errno
import os
import platform
import shlex
import sys
import tempfile
import traceback
from collections.abc import Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from hymba_tune import __version__
from hymba_tune.errors import ConfigError, shortened, without_passwords

OF_THE_MACHINE = {
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM),
    *(errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EMFILE),
}
"""Errors of files that the user can do something about: names, permissions, full disks."""


def as_own_error(error: Exception) -> ConfigError | None:
    """Return the user's error for a file that cannot be used, whichever step found it; None for other errors."""
    if isinstance(error, RuntimeError) and "home directory" in str(error):
        return ConfigError("A name begins with ~ and a user that this machine does not have.", fix="the whole path")
    if isinstance(error, RuntimeError) and "Symlink loop" in str(error):
        return ConfigError(f"{shortened(str(error))}.", fix="another name")
    if not isinstance(error, OSError) or error.errno not in OF_THE_MACHINE:
        return None
    name = str(error.filename or "a file")
    return ConfigError(
        f"Cannot use {shortened(name)}: {error.strerror}.",
        fix="another name or folder, or change its permissions, or free space on its disk",
    )


def describe_crash(error: Exception, words: Sequence[str]) -> str:
    """Write the log of an unexpected error, and return a line that says where it is and where to report it."""
    what = " ".join(f"{type(error).__name__}: {error}".split())
    return f"Internal error: {shortened(without_passwords(what))} (log: {_log(error, words)}; report it: {_tracker()})"


def _log(error: Exception, words: Sequence[str]) -> str:
    lines = [
        shlex.join(["hymba-tune", *words]),
        f"hymba-tune {__version__}, Python {platform.python_version()}, {platform.platform()}",
        *(f"{name} {module.__version__}" for name in ("torch", "transformers") if (module := sys.modules.get(name))),
        "",
        "".join(traceback.format_exception(error)),
    ]
    folder = None  # the system's for temporary files
    with suppress(OSError, RuntimeError):  # RuntimeError: there is no home
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "hymba-tune", "errors")
        cache.mkdir(parents=True, exist_ok=True)
        folder = cache
    try:
        descriptor, path = tempfile.mkstemp(".log", "error-", folder)
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(without_passwords("\n".join(lines)))
    except OSError as full:
        return f"cannot be written: {full.strerror}"
    return path


def _tracker() -> str:
    """Return the address of the package's issue tracker, if its metadata has one."""
    urls = metadata.metadata("hymba-tune").get_all("Project-URL") or []
    addresses: dict[str, str] = {label.lower(): address for label, _, address in (url.partition(", ") for url in urls)}
    return addresses.get("issues", "the project's issue tracker")

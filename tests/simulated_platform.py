"""Runs this package as it would find Windows or macOS: `python -m tests.simulated_platform win32 [VERB ...]`.

Only the package sees that system, by what its imports return; libraries go on seeing Linux. Without a verb, every
module is imported. What a simulation cannot show: file systems that refuse to rename what is open, consoles, libraries.
"""

from __future__ import annotations

import builtins
import importlib
import json
import os
import pkgutil
import platform
import signal
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import psutil

POSIX_MODULES = {"curses", "fcntl", "grp", "posix", "pty", "pwd", "readline", "resource", "syslog", "termios", "tty"}
NO_WHEELS = {"deepspeed", "flash_attn", "mamba_ssm", "causal_conv1d", "selective_scan_cuda", "triton"}
"""What neither Windows nor macOS has, as far as its makers publish it."""
POSIX_OS = {
    *("chown", "confstr", "fchown", "fork", "forkpty", "geteuid", "getegid", "getgid", "getgroups", "getloadavg"),
    *("getpgid", "getpriority", "getuid", "killpg", "lchown", "mkfifo", "nice", "openpty", "posix_spawn", "pread"),
    *("pwrite", "register_at_fork", "sched_getaffinity", "setgid", "setpgid", "setsid", "setuid", "statvfs", "sync"),
    *("sysconf", "sysconf_names", "uname", "wait", "wait3", "wait4", "waitid", "O_CLOEXEC", "O_DIRECTORY"),
    *("O_NOFOLLOW", "O_NONBLOCK", "O_SYNC"),
}
WINDOWS_SIGNALS = {"SIGABRT", "SIGFPE", "SIGILL", "SIGINT", "SIGSEGV", "SIGTERM"}
POSIX_SIGNAL = {
    *(name for name in dir(signal) if name.startswith("SIG") and name[3].isalpha()),
    *("alarm", "pause", "pthread_kill", "pthread_sigmask", "setitimer", "siginterrupt", "sigpending", "sigwait"),
} - WINDOWS_SIGNALS


class Partial(ModuleType):
    """A module of which some names are missing or replaced.

    Args:
        module: The module.
        missing: Names that it does not have.
        replaced: Its other names.
    """

    def __init__(self, module: ModuleType, missing: set[str] = frozenset(), **replaced: Any) -> None:  # type: ignore[assignment]
        super().__init__(module.__name__)
        self.__dict__.update(replaced)
        self._module, self._missing = module, missing

    def __getattr__(self, name: str) -> Any:
        if name in self._missing:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r} on this system")
        return getattr(self._module, name)


def _open(path: Any, *arguments: Any, **more: Any) -> int:
    if os.path.isdir(path):  # noqa: PTH112 (as given)
        raise PermissionError(13, "Permission denied", str(path))
    return os.open(path, *arguments, **more)


def _no_lock(*_: Any) -> None:
    """Stand in for msvcrt.locking, which Linux does not have."""


def _process() -> Any:
    """Stand in for psutil.Process, which knows the peak on Windows only."""
    held = psutil.Process().memory_info().rss
    return SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=held, peak_wset=held))


MSVCRT = ModuleType("msvcrt")
MSVCRT.locking, MSVCRT.LK_LOCK, MSVCRT.LK_NBLCK = _no_lock, 1, 2  # type: ignore[attr-defined]
PLATFORM = Partial(platform, libc_ver=lambda: ("", ""), system=lambda: "simulated")
SYSTEMS: Mapping[str, Mapping[str, ModuleType | None]] = {
    "win32": {
        **dict.fromkeys(POSIX_MODULES | NO_WHEELS),
        "msvcrt": MSVCRT,
        "os": Partial(os, POSIX_OS, name="nt", open=_open),
        "platform": PLATFORM,
        "psutil": Partial(psutil, Process=_process),
        "signal": Partial(signal, POSIX_SIGNAL),
        "sys": Partial(sys, platform="win32"),
    },
    "darwin": {
        **dict.fromkeys(NO_WHEELS),
        "os": Partial(os, {"sched_getaffinity"}),
        "platform": PLATFORM,
        "sys": Partial(sys, platform="darwin"),
    },
}


def simulate(system: str) -> None:
    """Let the package's imports return the modules of a system.

    Args:
        system: A key of `SYSTEMS`.
    """
    modules, original = SYSTEMS[system], builtins.__import__

    def imported(
        name: str,
        globals: Mapping[str, Any] | None = None,
        locals: Any = None,
        fromlist: Sequence[str] = (),
        level: int = 0,
    ) -> ModuleType:
        first = name.partition(".")[0]
        if level or first not in modules or not str((globals or {}).get("__name__")).startswith("hymba_tune"):
            return original(name, globals, locals, fromlist, level)
        if (found := modules[first]) is None:
            raise ModuleNotFoundError(f"No module named {name!r} (on {system})", name=name)
        return found

    builtins.__import__ = imported


def import_everything() -> tuple[int, list[str]]:
    """Import every module of the package.

    Returns:
        Their number, and those that cannot be imported because they need what has no wheels.
    """
    import hymba_tune

    names = [found.name for found in pkgutil.walk_packages(hymba_tune.__path__, "hymba_tune.")]
    without = []
    for name in names:
        if name.endswith("__main__"):
            continue
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if str(error.name).partition(".")[0] not in NO_WHEELS:
                raise
            without.append(name.removeprefix("hymba_tune."))
    return len(names), without


if __name__ == "__main__":
    simulate(sys.argv[1])
    if sys.argv[2:]:
        from hymba_tune.cli.main import main

        main(sys.argv[2:])
    else:
        sys.stdout.write(json.dumps(import_everything()))

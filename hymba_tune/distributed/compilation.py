"""Locks that a killed compilation has left: whoever needs the same library waits for them forever, silently."""

from __future__ import annotations

import os
import shlex
import sys
import time
from pathlib import Path

from hymba_tune.errors import ConfigError

LIBRARIES: tuple[str, ...] = ("fused_adam", "cpu_adam", "cpu_adagrad", "cpu_lion", "fused_lion", "fused_lamb", "utils")
LIBRARIES += ("deepspeed_shm_comm", "deepspeed_ccl_comm")
"""What DeepSpeed compiles when it is used first."""
STALE_SECONDS = 600.0
"""Age at which a lock counts as stale where another machine could hold it."""


def check_compilation(*, alone: bool) -> None:
    """Check that DeepSpeed will not wait for a compilation that has been killed.

    Args:
        alone: Whether no other machine takes part; what no process here holds is then stale, whatever its age.

    Raises:
        ConfigError: If there is a stale lock; it names the file.
    """
    for lock in sorted(path for path in _locks() if path.parent.name in LIBRARIES):
        try:
            age = time.time() - lock.stat().st_mtime
        except OSError:
            continue  # its maker has just released it
        if not _is_held(lock) and ((alone and Path("/proc/self/fd").is_dir()) or age > STALE_SECONDS):
            raise ConfigError(
                f"{lock} is left from a compilation that was killed {age:.0f} s ago, and DeepSpeed would wait for it "
                "forever.",
                fix=f"{shlex.join(['rm', str(lock)])}, unless another machine or container compiles there now",
            )


def _locks() -> list[Path]:
    """Return the locks in the folder in which torch compiles extensions, as its `FileBaton` names them."""
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    home = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    root = Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or home, "torch_extensions")
    return [*root.glob("*/lock"), *root.glob("*/*/lock")]


def _is_held(lock: Path) -> bool:
    """Return whether a process of this machine has the file open, as its maker does until it is done."""
    target = os.path.realpath(lock)
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if str(descriptor.readlink()) == target:
                return True
        except OSError:
            continue  # another user's, or closed by now
    return False

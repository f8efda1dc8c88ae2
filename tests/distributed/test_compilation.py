from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from torch.utils.file_baton import FileBaton

from hymba_tune.distributed.compilation import STALE_SECONDS, check_compilation
from hymba_tune.errors import ConfigError


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "cpu_adam").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "lock").touch()  # of somebody else's extension
    return tmp_path / "cpu_adam" / "lock"


def test_lock_of_a_living_compilation_is_no_error(lock: Path) -> None:
    check_compilation(alone=True)
    baton = FileBaton(str(lock))
    assert baton.try_acquire()
    check_compilation(alone=True)
    baton.release()


def test_lock_of_a_dead_compilation_is_named(lock: Path) -> None:
    lock.touch()
    with pytest.raises(ConfigError, match=rf"{lock} is left from a compilation that was killed .*\n .* rm {lock}"):
        check_compilation(alone=True)


def test_lock_that_another_machine_may_hold_counts_by_its_age(lock: Path) -> None:
    lock.touch()
    check_compilation(alone=False)
    long_ago = time.time() - STALE_SECONDS - 1
    os.utime(lock, (long_ago, long_ago))
    with pytest.raises(ConfigError, match="would wait for it forever"):
        check_compilation(alone=False)


def test_lock_is_found_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "torch_extensions" / "py311_cu128" / "fused_adam"
    folder.mkdir(parents=True)
    (folder / "lock").touch()
    with pytest.raises(ConfigError, match="fused_adam/lock is left"):
        check_compilation(alone=True)

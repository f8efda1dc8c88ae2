from __future__ import annotations

import errno
import threading
from pathlib import Path
from typing import Any

import pytest

from hymba_tune.errors import ConfigError
from hymba_tune.files import InUseError, locked, locks
from tests.files.inputs import hold


def test_second_process_is_refused_and_a_dead_one_keeps_no_lock(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    process = hold(path)
    with pytest.raises(ConfigError, match=r"--out it is in use by another process of hymba-tune\.\n.*wait until"):
        locked(path, "--out it").__enter__()
    process.kill()
    process.communicate()
    assert path.exists()
    with locked(path):
        pass
    assert not path.exists()


def test_second_thread_is_refused(tmp_path: Path) -> None:
    with locked(tmp_path / ".lock"), pytest.raises(ConfigError, match=r"\.lock is in use by another process"):
        locked(tmp_path / ".lock").__enter__()
    assert not list(tmp_path.iterdir())


def test_shared_lock_keeps_out_only_those_that_do_not_share_it(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with locked(path, shared=True):
        with locked(path, shared=True), pytest.raises(InUseError, match="in use by another process"):
            locked(path).__enter__()
        assert path.exists()
        with pytest.raises(InUseError, match="in use by another process"):
            locked(path).__enter__()
    assert not path.exists()
    with locked(path), pytest.raises(InUseError, match="in use by another process"):
        locked(path, shared=True).__enter__()


def test_lock_whose_file_was_removed_meanwhile_is_taken_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, opened, held = tmp_path / ".lock", threading.Event(), []
    lock = locks._lock

    def noted(file: Any, *, wait: bool, shared: bool) -> None:
        if wait:
            opened.set()
        lock(file, wait=wait, shared=shared)

    def second() -> None:
        with locked(path, wait=True):
            held.append(path.exists())

    monkeypatch.setattr(locks, "_lock", noted)
    thread = threading.Thread(target=second)
    with locked(path):
        thread.start()
        assert opened.wait(60)
    thread.join(60)
    assert held == [True]


def test_file_system_without_locks_does_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks, "_lock", refuse)
    with locked(tmp_path / ".lock"):
        assert (tmp_path / ".lock").exists()
    assert not list(tmp_path.iterdir())


def test_lock_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--out no cannot be written: No such file or directory\.\n.*use another"):
        locked(tmp_path / "no/.lock", "--out no").__enter__()

"""A process that waits for others in vain ends, and says why."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from hymba_tune.distributed import watch
from hymba_tune.distributed.launch import (
    ENDED,
    ENDED_BY_ANOTHER,
    ERRORS,
    INTERRUPT,
    Ending,
    RankError,
    read_ending,
    write_ending,
)


class EndedError(BaseException):
    """The end of the process, which a test can catch."""


class Store(dict[str, bytes]):
    """The methods of a store that are used."""

    def clone(self) -> Store:
        return self

    def set(self, key: str, value: bytes | str) -> None:
        self[key] = value if isinstance(value, bytes) else value.encode()

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)

    def compare_set(self, key: str, expected: str, value: str) -> bytes:
        assert expected == ""
        return self.setdefault(key, value.encode())


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    """The store of two processes; this one is rank 0."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "there")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.delenv("RANK", raising=False)

    def end(code: int) -> None:
        raise EndedError(code)

    monkeypatch.setattr(os, "_exit", end)
    return Store({"host/1": b"b", "pid/1": b"1"})


@pytest.fixture
def watching(store: Store, monkeypatch: pytest.MonkeyPatch) -> watch.Watch:
    """A watch that has met the others, whose own threads do not run."""
    monkeypatch.setattr(threading.Thread, "start", lambda _: None)
    monkeypatch.setattr(watch, "_watch", None)
    watching = watch.start()
    watching.attend(store, step_timeout=1.0)
    return watching


@pytest.fixture
def errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(ERRORS, str(tmp_path / "error"))
    return tmp_path / "error"


def look(watching: watch.Watch, times: int = 1) -> None:
    """Look as if the usual time had passed each time."""
    for _ in range(times):
        watching._looked -= watch.SECONDS
        watching.look()


def test_silent_rank_is_named(watching: watch.Watch, store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    look(watching)
    watching._silence["store"] = -10.0  # which answers
    with pytest.raises(EndedError, match=str(ENDED_BY_ANOTHER)):
        look(watching, 5)
    assert capsys.readouterr().err.startswith("rank 1 on b has been silent for 1 s; the other processes end.")
    assert json.loads(store[ENDED])["message"].startswith("rank 1 on b has been silent")


def test_process_that_was_stopped_itself_has_not_waited(watching: watch.Watch) -> None:
    look(watching)
    watching._looked -= 1e6
    watching.look()
    watching.leave()
    look(watching, 5)


def test_rank_that_has_done_its_part_may_be_silent(watching: watch.Watch, store: Store) -> None:
    store.set("left/1", b"")
    watching._silence["store"] = -10.0
    look(watching, 9)


def test_store_that_is_gone_is_named(
    watching: watch.Watch, store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lost(*_: Any) -> int:
        raise RuntimeError("Connection reset by peer")

    store.add = lost  # type: ignore[attr-defined]
    watching._listen()
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(EndedError):
        look(watching)
    assert "from there:29500, where the processes meet; the other processes end" in capsys.readouterr().err


def test_worker_writes_why_for_its_parent(store: Store, errors: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading.Thread, "start", lambda _: None)
    watching = watch.Watch()
    watching.attend(store, step_timeout=100)
    watching._verdict = Ending(1, "rank 1 on b was ended by SIGKILL", 1)
    with pytest.raises(EndedError, match=str(ENDED_BY_ANOTHER)):
        look(watching)
    assert read_ending(errors, 0) == Ending(ENDED_BY_ANOTHER, "rank 1 on b was ended by SIGKILL", 0)


def test_listening_counts_beats_and_finds_who_has_ended(watching: watch.Watch, store: Store) -> None:
    beats = iter(range(9))

    def add(key: str, amount: int) -> int:
        if amount == 0:
            assert key == "beat/1"
            store.set(ENDED, json.dumps(asdict(Ending(2, "--data: gone", 1))))
        watching._left = key == "beat/1" and next(beats) > 0
        return 7

    store.add = add  # type: ignore[attr-defined]
    watching._silence = {"store": 5.0, "next": 5.0}
    watching._listen()
    assert watching._silence == {"store": 0.0, "next": 0.0}
    assert watching._verdict == Ending(2, "--data: gone", 1)


def test_mistake_of_the_user_elsewhere_leaves_time_to_end(
    watching: watch.Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    watching._silence = {"store": -100.0, "next": -100.0}
    watching._verdict = Ending(2, "--data: gone", 1)
    look(watching, 5)
    monkeypatch.setattr(watch, "GRACE_SECONDS", 1.0)
    with pytest.raises(EndedError, match="2"):
        look(watching, 3)


def test_interrupts_of_the_parent_are_signals(errors: Path) -> None:
    watching = watch.Watch()
    errors.with_name(f"{INTERRUPT}1").touch()
    with pytest.raises(KeyboardInterrupt):
        watching.look()
    watching.look()  # each of them once
    errors.with_name(f"{INTERRUPT}2").touch()
    with pytest.raises(KeyboardInterrupt):
        watching.look()


@pytest.mark.usefixtures("store", "errors")
def test_worker_ends_after_its_parent(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    watching = watch.Watch()
    monkeypatch.setattr(os, "getppid", lambda: 1)
    with pytest.raises(EndedError):
        watching.look()
    assert "the process that started this one has ended" in capsys.readouterr().err


def test_worker_follows_another_one_of_its_machine(errors: Path) -> None:
    watching = watch.Watch()
    write_ending(2, "--data: gone")
    assert read_ending(errors) == Ending(2, "--data: gone", 0)
    watching.look()
    assert watching._verdict == Ending(2, "--data: gone", 0)


@pytest.mark.usefixtures("watching")
def test_one_process_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    assert watch.tell(2, "mine")
    monkeypatch.setenv("RANK", "1")
    assert not watch.tell(2, "theirs")


def test_without_the_others_the_first_rank_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_watch", None)
    assert watch.tell(2, "a mistake")
    monkeypatch.setenv("RANK", "1")
    assert not watch.tell(2, "a mistake")


@pytest.mark.usefixtures("watching")
def test_errors_of_connections_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "VERDICT_SECONDS", 0.0)
    lost = watch.explain(RuntimeError("[gloo/pair.cc:547] Connection closed by peer [127.0.0.1]:1"))
    assert isinstance(lost, RankError)
    assert str(lost).startswith("rank 0 has lost its connection to another process")
    late = watch.explain(RuntimeError("Timed out waiting 1000ms for recv operation to complete"))
    assert isinstance(late, RankError)
    assert "a step did not end within --step-timeout: rank 0 has waited" in str(late)
    assert watch.explain(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert watch.explain(ValueError("Connection closed by peer")) is None


def test_stopped_rank_of_this_machine_is_woken_to_be_ended(
    watching: watch.Watch, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[Any] = []
    monkeypatch.setattr(os, "kill", lambda *arguments: sent.append(arguments))
    store.set("host/1", socket.gethostname())
    store.set("pid/1", "4321")
    watching._silence = {"store": 0.0, "next": 9.0}
    with pytest.raises(EndedError):
        look(watching)
    assert sent == [(4321, signal.SIGCONT)]

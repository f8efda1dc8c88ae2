"""Processes that end in every way, and what the one that has started them says. The workers do no training."""

from __future__ import annotations

import os
import pickle
import re
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import pytest

from hymba_tune.config import SFTConfig
from hymba_tune.distributed import launch
from hymba_tune.errors import ConfigError, HymbaTuneError
from hymba_tune.files.sealing import seal
from tests.distributed import worker

Launch = Callable[..., None]
HOST = re.escape(socket.gethostname())


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The directory of a run with a complete checkpoint."""
    checkpoint = tmp_path / "a run" / "checkpoints" / "checkpoint-5"
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights").write_text("")
    seal(checkpoint)
    return tmp_path / "a run"


@pytest.fixture
def launched(run: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Launch]:
    """Runs two workers."""
    monkeypatch.setattr(launch, "WORKER", (worker.__file__,))

    def call(what: str, **settings: object) -> None:
        os.environ["TEST_WORKER"] = what
        launch.launch("sft", SFTConfig.model_validate(settings), 2, run=run)

    with patch.dict(os.environ):
        yield call


def test_workers_that_are_done_are_no_error(launched: Launch) -> None:
    launched("done")
    assert launch.ERRORS not in os.environ


def test_mistake_of_the_user_is_told_once_and_nothing_is_restarted(launched: Launch) -> None:
    with pytest.raises(HymbaTuneError, match=r"^--rank 0: must be at least 1\.$") as raised:
        launched("fail", max_restarts=3)
    assert raised.value.exit_code == 2


def test_killed_rank_is_named_with_the_way_on(launched: Launch, run: Path) -> None:
    with pytest.raises(launch.RankError) as raised:
        launched("killed")
    assert raised.value.exit_code == 128 + signal.SIGKILL
    assert re.fullmatch(
        rf"rank 1 on {HOST} was ended by SIGKILL \(.*\); the other processes were stopped\. "
        rf"The last complete checkpoint is {run}/checkpoints/checkpoint-5\.\n"
        rf"  to fix     hymba-tune sft --resume '{run}'",
        str(raised.value),
    )


def test_stopped_rank_is_named(launched: Launch) -> None:
    with pytest.raises(launch.RankError, match=rf"^rank 1 on {HOST} has been silent for 2 s; the other") as raised:
        launched("stopped")
    assert raised.value.exit_code == launch.ENDED_BY_ANOTHER


def test_internal_error_of_a_rank_is_told_once(launched: Launch) -> None:
    with pytest.raises(launch.RankError, match=rf"^rank 1 on {HOST}: Internal error: KeyError; the other") as raised:
        launched("crash")
    assert raised.value.exit_code == 1


def test_rank_that_says_nothing_is_named_by_its_exit_code(launched: Launch, run: Path) -> None:
    (run / "checkpoints" / "checkpoint-5" / "weights").unlink()
    with pytest.raises(launch.RankError, match=r"ended with exit code 3; .* no complete checkpoint yet\.") as raised:
        launched("exit")
    assert raised.value.exit_code == 3


def test_dead_rank_is_restarted(launched: Launch) -> None:
    launched("killed once", max_restarts=1)


def test_interrupt_reaches_the_workers(launched: Launch) -> None:
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        launched("interrupted", max_restarts=1)
    assert signal.getsignal(signal.SIGINT) is handler


def test_rendezvous_that_nobody_answers_is_one_error(launched: Launch, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("localhost", 0)) as server:
        address = f"localhost:{server.getsockname()[1]}"
    settings = {"nnodes": 2, "rendezvous": address, "start_timeout": 1, "node_rank": 0}
    with pytest.raises(ConfigError, match=rf"--rendezvous {address}: not all of the 2 machines .* 1 s\."):
        launched("done", **settings)
    assert capfd.readouterr().err == ""


def test_workers_get_the_settings_of_their_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch.settings_of_parent() is None
    settings = SFTConfig(out=tmp_path, overwrite=True)
    (tmp_path / launch.SETTINGS).write_bytes(pickle.dumps(settings))
    monkeypatch.setenv(launch.ERRORS, str(tmp_path / "error"))
    again = launch.settings_of_parent()
    assert again == settings
    assert again.overwrite
    launch.write_ending(2, "first")
    launch.write_ending(2, "second")
    assert launch.read_ending(tmp_path / "error") == launch.Ending(2, "first", 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["error", launch.SETTINGS]
    with pytest.raises(SystemExit):  # a worker that is restarted although another one has ended for good
        launch.settings_of_parent()

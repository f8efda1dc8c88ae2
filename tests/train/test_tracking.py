from __future__ import annotations

import os
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hymba_tune.config import Tracker
from hymba_tune.errors import ConfigError
from hymba_tune.train import tracking as module
from hymba_tune.train.run import Run
from hymba_tune.train.tracking import check_trackers, tracker_arguments, tracking
from tests.runs import run, settings

NAMES = (
    "TENSORBOARD_LOGGING_DIR",
    "MLFLOW_EXPERIMENT_NAME",
    "WANDB_MODE",
    "WANDB_DIR",
    "WANDB_PROJECT",
    "WANDB_API_KEY",
)


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As on a machine on which nothing was set, and nobody has logged in."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


@pytest.fixture
def started(tmp_path: Path) -> Run:
    (tmp_path / "my-run").mkdir()
    return Run(tmp_path / "my-run")


def test_tensorboard_gets_what_the_metrics_say(small_model: Path, questions: Path, tmp_path: Path) -> None:
    finished = run(settings(small_model, questions, tmp_path / "out", track=["tensorboard"], eval_every=2))
    events = EventAccumulator(str(finished.path / "track/tensorboard"))
    events.Reload()
    for tag, name in (("train/loss", "loss"), ("eval/loss", "eval_loss"), ("train/learning_rate", "learning_rate")):
        logged = [(event.step, event.value) for event in events.Scalars(tag)]
        written = [(row.step, getattr(row, name)) for row in finished.rows() if getattr(row, name) is not None]
        assert logged == [(step, pytest.approx(value, rel=1e-5)) for step, value in written]
    assert "TENSORBOARD_LOGGING_DIR" not in os.environ


def test_package_that_is_missing_is_said_before_weights_are_read(
    questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wandb").mkdir()  # a folder in which the tracker once wrote
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "find_spec", lambda name: ModuleSpec(name, None) if name == "wandb" else None)
    with pytest.raises(ConfigError, match=r"--track trackio wandb: not installed\.\n.*pip install trackio wandb"):
        run(settings(tmp_path / "no-model", questions, tmp_path / "out", track=["trackio", "wandb"]))
    assert not (tmp_path / "out").exists()


def test_runs_are_called_by_their_names(started: Run) -> None:
    check_trackers([Tracker.tensorboard])
    arguments = tracker_arguments(started, [Tracker.tensorboard, Tracker.mlflow])
    assert arguments == {"report_to": ["tensorboard", "mlflow"], "run_name": "my-run", "project": "hymba-tune"}
    assert tracker_arguments(started, [])["report_to"] == "none"


def test_without_a_login_wandb_stays_offline(started: Run) -> None:
    with tracking(started, [Tracker.wandb, Tracker.mlflow]):
        assert os.environ["WANDB_MODE"] == "offline"
        assert os.environ["WANDB_DIR"] == str(started.path / "track")
        assert (started.path / "track").is_dir()
        assert os.environ["MLFLOW_EXPERIMENT_NAME"] == os.environ["WANDB_PROJECT"] == "hymba-tune"
    assert not [name for name in NAMES if name in os.environ]


def test_with_a_login_wandb_does_as_its_user_set_it_up(
    started: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password not-a-key\n")
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    with tracking(started, [Tracker.wandb]):
        assert "WANDB_MODE" not in os.environ
        assert os.environ["WANDB_PROJECT"] == "mine"
    assert os.environ["WANDB_PROJECT"] == "mine"
    (tmp_path / "netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "not-a-key")
    with tracking(started, [Tracker.wandb]):
        assert "WANDB_MODE" not in os.environ

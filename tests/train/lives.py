"""Runs in processes of their own, which can be killed: forked from a server that has imported everything once."""

from __future__ import annotations

import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from hymba_tune.config import SFTConfig
from hymba_tune.files import aside
from hymba_tune.train import flow, trainer
from hymba_tune.train.resuming import resume_config
from hymba_tune.train.screen import MetricsRow, Screen
from tests.runs import run

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.train.lives"])
LIFE_SECONDS = 120
"""More than any takes: one that hangs is seen to have failed."""


def live(config: SFTConfig, deadly: str | None = None) -> tuple[Any, Connection]:
    """Start a life of a run: from its beginning, or with ``resume`` from its last checkpoint.

    Args:
        config: Of the run.
        deadly: What it dies of: one of `MOMENTS`.

    Returns:
        The process, and what it tells its steps through.
    """
    receiver, sender = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=_live, args=(config, sender, deadly))
    process.start()
    sender.close()
    return process, receiver


def outlive(config: SFTConfig, deadly: str | None = None) -> int:
    """A life to its end; its exit code."""
    process, _ = live(config, deadly)
    process.join(LIFE_SECONDS)
    assert process.exitcode is not None
    return int(process.exitcode)


class _Telling(Screen):
    """Tells each step as its row comes."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def row(self, row: MetricsRow, *, total_steps: int, seconds_left: float | None) -> None:
        del total_steps, seconds_left
        self._pipe.send(row.step)


def _live(config: SFTConfig, pipe: Connection, deadly: str | None) -> None:
    config = resume_config(config) if config.resume else config
    if deadly is None:
        run(config, _Telling(pipe))
    else:
        target, name, when = MOMENTS[deadly]
        with patch.object(target, name, when(getattr(target, name))):
            run(config, _Telling(pipe))


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _half_written(write: Any) -> Any:
    """Dies with a file cut in half."""

    def save(content: Any, path: str, *args: Any, **kwargs: Any) -> None:
        write(content, path, *args, **kwargs)
        os.truncate(path, Path(path).stat().st_size // 2)
        _die()

    return save


def _before(_: Any) -> Any:
    """Dies when a function is called."""
    return lambda *_, **__: _die()


def _after(function: Any) -> Any:
    """Dies when a function has done its work."""

    def call(*args: Any, **kwargs: Any) -> None:
        function(*args, **kwargs)
        _die()

    return call


def _fifth(function: Any) -> Any:
    """Dies when a function is called for the fifth time."""
    calls = iter(range(4))

    def call(*args: Any, **kwargs: Any) -> Any:
        if next(calls, None) is None:
            _die()
        return function(*args, **kwargs)

    return call


MOMENTS = {
    "step": (torch.optim.AdamW, "step", _fifth),
    "checkpoint half written": (torch, "save", _half_written),
    "checkpoint written, not sealed": (trainer.HymbaTrainer, "_save_checkpoint", lambda _: _unsealed),
    "evaluation": (trainer.HymbaTrainer, "evaluation_loop", _before),
    "evaluated": (trainer.HymbaTrainer, "evaluation_loop", _after),
    "answers after training": (flow, "answer_samples", _before),
    "weights written aside": (flow, "_save", lambda _: _written_aside),
    "weights written, not recorded": (flow, "_save", _after),
}
"""What is replaced in a life, and by what, for it to die of."""


def _unsealed(self: Any, model: Any, trial: Any) -> None:
    from transformers import Trainer

    Trainer._save_checkpoint(self, model, trial)
    _die()


def _written_aside(setup: Any, trained: Any) -> None:
    trained.save_pretrained(aside(setup.run.path / "adapter"))
    _die()

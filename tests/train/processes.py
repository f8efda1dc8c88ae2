"""Runs in separate processes, which can be killed. They fork from a server that has imported everything once."""

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
ALSO = ["tests.cli.killed", "tests.distributed.test_distill", "tests.distributed.processes", "deepspeed"]
FORKS.set_forkserver_preload(["tests.train.processes", *ALSO])
TIMEOUT_SECONDS = 120
"""More than any process takes, so that one that hangs fails the test."""


def start_process(config: SFTConfig, crash: str | None = None) -> tuple[Any, Connection]:
    """Start a process with a run: a new one, or with ``resume`` one from the last checkpoint.

    Args:
        config: The run's settings.
        crash: The name of the crash, a key of `CRASHES`; None for no crash.

    Returns:
        The process, and the connection on which it sends the number of each step.
    """
    receiver, sender = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=_run_in_process, args=(config, sender, crash))
    process.start()
    sender.close()
    return process, receiver


def run_to_exit(config: SFTConfig, crash: str | None = None) -> int:
    """Run a process to its end, and return its exit code."""
    process, _ = start_process(config, crash)
    process.join(TIMEOUT_SECONDS)
    assert process.exitcode is not None
    return int(process.exitcode)


class _SendingScreen(Screen):
    """Sends the number of each step."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def row(self, row: MetricsRow, *, total_steps: int, seconds_left: float | None) -> None:
        del total_steps, seconds_left
        self._pipe.send(row.step)


def _run_in_process(config: SFTConfig, pipe: Connection, crash: str | None) -> None:
    config = resume_config(config) if config.resume else config
    if crash is None:
        run(config, _SendingScreen(pipe))
    else:
        target, name, when = CRASHES[crash]
        with patch.object(target, name, when(getattr(target, name))):
            run(config, _SendingScreen(pipe))


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _half_written(write: Any) -> Any:
    """Die with a file cut in half."""

    def save(content: Any, path: str, *args: Any, **kwargs: Any) -> None:
        write(content, path, *args, **kwargs)
        os.truncate(path, Path(path).stat().st_size // 2)
        _die()

    return save


def _before(_: Any) -> Any:
    """Die when a function is called."""
    return lambda *_, **__: _die()


def _after(function: Any) -> Any:
    """Die when a function returns."""

    def call(*args: Any, **kwargs: Any) -> None:
        function(*args, **kwargs)
        _die()

    return call


def _fifth(function: Any) -> Any:
    """Die when a function is called for the fifth time."""
    calls = iter(range(4))

    def call(*args: Any, **kwargs: Any) -> Any:
        if next(calls, None) is None:
            _die()
        return function(*args, **kwargs)

    return call


CRASHES = {
    "step": (torch.optim.AdamW, "step", _fifth),
    "checkpoint half written": (torch, "save", _half_written),
    "checkpoint written, not sealed": (trainer.HymbaTrainer, "_save_checkpoint", lambda _: _unsealed),
    "evaluation": (trainer.HymbaTrainer, "evaluation_loop", _before),
    "evaluated": (trainer.HymbaTrainer, "evaluation_loop", _after),
    "answers after training": (flow, "answer_samples", _before),
    "weights written aside": (flow, "_save", lambda _: _written_aside),
    "weights written, not recorded": (flow, "_save", _after),
}
"""The function to replace for each crash, and the replacement."""


def _unsealed(self: Any, model: Any, trial: Any) -> None:
    from transformers import Trainer

    Trainer._save_checkpoint(self, model, trial)
    _die()


def _written_aside(setup: Any, trained: Any) -> None:
    trained.save_pretrained(aside(setup.run.path / "adapter"))
    _die()

"""What happens in one process alone, a broken row, a full disk or Ctrl-C, ends the run in all, in the same way."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import Trainer

from hymba_tune.config import SFTConfig
from hymba_tune.distributed.environment import rank
from hymba_tune.errors import TrainingError
from hymba_tune.train.run import Run
from hymba_tune.train.screen import MetricsRow, Screen
from tests.distributed.processes import in_processes, train
from tests.runs import settings

pytestmark = pytest.mark.end_to_end

ROWS = 8


@pytest.fixture
def config(small_model: Path, questions: Path, tmp_path: Path) -> SFTConfig:
    """Four rows a step in two processes, in their order in the file."""
    changes = {"steps": 4, "save_every": 2, "batch_size": 2, "device": "cpu", "packing": False}
    return settings(small_model, questions, tmp_path / "run", **changes)


def broken_in_rank_1(config: SFTConfig) -> None:
    """Train with a loss of the second process's first batch that is no number."""
    step = Trainer.training_step

    def broken(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss: torch.Tensor = step(self, *args, **kwargs)
        return loss * math.nan if rank() == 1 and self.state.global_step == 2 else loss

    with patch.object(Trainer, "training_step", broken):
        train(config)


def test_row_of_a_loss_that_is_not_finite_is_named_by_all(config: SFTConfig, questions: Path) -> None:
    errors = in_processes(2, broken_in_rank_1, config)
    assert [type(error) for error in errors] == [TrainingError] * 2
    assert errors[0].what == errors[1].what
    assert errors[0].what.startswith(f"The loss is nan at step 3. Its rows: {questions}, line ")
    assert errors[0].what.count(",") == 2  # the two rows of the second process, not all four of the step
    assert "checkpoint-2 starts from the last good weights" in errors[0].details["to fix"]


def full_in_rank_0(config: SFTConfig) -> None:
    """Train with a disk that is full when the first process writes its second checkpoint's optimizer state."""
    save = torch.save

    def fails(content: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        if rank() == 0 and str(path).endswith("checkpoint-4/optimizer.pt"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(content, path, *args, **kwargs)

    with patch.object(torch, "save", fails):
        train(config)


def test_full_disk_of_one_process_ends_all(config: SFTConfig) -> None:
    errors = in_processes(2, full_in_rank_0, config)
    assert [type(error) for error in errors] == [TrainingError] * 2
    assert errors[0].what == errors[1].what == f"The disk of {config.out} is full."
    assert config.out is not None
    assert errors[1].details["to fix"] == f"free some space, then --resume {config.out} (from checkpoint-2)"
    assert not (config.out / "checkpoints" / "checkpoint-4").exists()


class Presses(Screen):
    """Presses Ctrl-C after the first step."""

    def row(self, row: MetricsRow, *, total_steps: int, seconds_left: float | None) -> None:
        del total_steps, seconds_left
        if row.step == 1:
            os.kill(os.getpid(), signal.SIGINT)


def pressed_in_rank_1(config: SFTConfig) -> None:
    """Train, and press Ctrl-C in the second process alone."""
    train(config, Presses() if rank() == 1 else Screen())


def test_ctrl_c_in_one_process_saves_and_ends_all(config: SFTConfig) -> None:
    errors = in_processes(2, pressed_in_rank_1, config.model_copy(update={"save_every": 4}))
    assert [(type(error), error.args) for error in errors] == [(KeyboardInterrupt, (str(config.out),))] * 2
    assert config.out is not None
    run = Run(config.out)
    assert run.last_checkpoint().name == "checkpoint-2"
    assert [row.step for row in run.rows() if row.loss is not None] == [1, 2]


def resumed(config: SFTConfig) -> None:
    """Resume a run, as the command line does."""
    from hymba_tune.train.resuming import resume_config

    train(resume_config(config))


def stopped_in_an_epoch(config: SFTConfig) -> None:
    """Train to the checkpoint of a step in the middle of the second epoch, and stop as if killed."""

    class Stop(Screen):
        def row(self, row: MetricsRow, *, total_steps: int, seconds_left: float | None) -> None:
            del total_steps, seconds_left
            if row.step == 5:
                raise SystemExit

    train(config, Stop())


def test_resumed_in_an_epoch_equals_uninterrupted(small_model: Path, tmp_path: Path) -> None:
    from tests.runs import same_tensors, save_questions

    data = save_questions(tmp_path / "rows.jsonl", 9)  # the second process has a filler at each epoch's end
    changes: dict[str, Any] = {"epochs": 2.5, "steps": None, "save_every": 2, "batch_size": 2, "device": "cpu"}
    changes |= {"packing": False, "lora_dropout": 0.2, "eval_data": [str(data)], "early_stopping": 9, "keep": "best"}
    whole = settings(small_model, data, tmp_path / "whole", **changes)
    assert in_processes(2, train, whole) == [None] * 2
    in_processes(2, stopped_in_an_epoch, whole.model_copy(update={"out": tmp_path / "stopped"}))
    assert Run(tmp_path / "stopped").last_checkpoint().name == "checkpoint-4"
    assert in_processes(2, resumed, SFTConfig(resume=tmp_path / "stopped")) == [None] * 2

    assert same_tensors(tmp_path / "whole" / "adapter", tmp_path / "stopped" / "adapter")
    numbers = [
        [(row.step, row.loss, row.eval_loss, row.grad_norm) for row in Run(tmp_path / name).rows()]
        for name in ("whole", "stopped")
    ]
    assert numbers[0] == numbers[1]
    kept = [json.loads((tmp_path / name / "run.json").read_text())["kept"] for name in ("whole", "stopped")]
    assert kept[0] == kept[1]

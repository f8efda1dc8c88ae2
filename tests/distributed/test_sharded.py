"""FSDP2 and ZeRO divide a model among two processes, which then train as one does, and leave an ordinary run."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import state
from accelerate.utils import DistributedType

from hymba_tune.config import ChatConfig, MergeConfig, SFTConfig
from hymba_tune.distributed.environment import rank
from hymba_tune.errors import ConfigError
from hymba_tune.generate.chat import ChatSession
from hymba_tune.hub import merge
from hymba_tune.train.resuming import for_processes, resume_config
from hymba_tune.train.run import Run
from hymba_tune.train.screen import MetricsRow, Screen
from tests.distributed.processes import in_processes, train
from tests.hub.silent import silent
from tests.runs import save_questions, tensors

pytestmark = pytest.mark.end_to_end

STRATEGIES = ("fsdp", "zero2", "zero3")
LOSS, HELD_OUT, WEIGHTS = 2e-6, 1e-6, 2e-7
"""Relative differences that only the order of sums makes; of the weights, that of their norms."""
NORM_OF_ALL = 5e-5
"""Of the gradient's norm where all weights are trained: one process adds its millions of squares in float32."""
NORM_OF_OTHER_BATCHES = 1e-5
"""Of the gradient's norm where the rows of a step are padded with other rows than in one process."""
ROWS = 9


def force(strategy: str) -> None:
    """Let Accelerate set up what it drops on CPUs, and DeepSpeed do without the kernels that it would compile."""
    types = {"fsdp": DistributedType.FSDP, "zero2": DistributedType.DEEPSPEED, "zero3": DistributedType.DEEPSPEED}
    set_up = state.AcceleratorState.__init__

    def forced(self: Any, *args: Any, deepspeed_plugin: Any = None, fsdp_plugin: Any = None, **others: Any) -> None:
        set_up(self, *args, deepspeed_plugin=deepspeed_plugin, fsdp_plugin=fsdp_plugin, **others)
        if fsdp_plugin is not None:
            self._shared_state.update(distributed_type=types[strategy], fsdp_plugin=fsdp_plugin)
        if deepspeed_plugin is not None:
            deepspeed_plugin.select(_from_accelerator_state=True)
            plugins = {"default": deepspeed_plugin}
            self._shared_state.update(distributed_type=types[strategy], deepspeed_plugins=plugins)

    state.AcceleratorState.__init__ = forced
    if strategy != "fsdp":
        os.environ["DS_ACCELERATOR"] = "cpu"
        from deepspeed.comm import torch as communication

        communication.build_shm_op = lambda *_: None


class Killing(Screen):
    """Kills this process when a step is shown, and with it the run."""

    def __init__(self, at_step: int) -> None:
        self._at_step = at_step

    def row(self, row: MetricsRow, **_: Any) -> None:
        """End the run at the step."""
        if row.step == self._at_step and row.loss is not None:
            os.kill(os.getpid(), signal.SIGKILL)


def train_divided(config: SFTConfig, killed_at: int | None = None) -> None:
    force(config.strategy)
    train(config, Killing(killed_at) if killed_at is not None and rank() == 1 else None)


def settings(model: Path, folder: Path, name: str, **changes: Any) -> SFTConfig:
    data = str(save_questions(folder / "rows.jsonl", ROWS))
    held_out = str(save_questions(folder / "held-out.jsonl", 5))
    usual: dict[str, Any] = {"dtype": "float32", "device": "cpu", "rank": 4, "lr": 2e-4, "lr_schedule": "constant"}
    usual |= {"warmup": 0.0, "log_every": 1, "max_length": 96, "steps": 4, "eval_every": 2, "batch_size": 4}
    own = {"model": str(model), "data": [data], "eval_data": [held_out], "out": folder / name}
    return SFTConfig.model_validate({**usual, **changes, **own})


def assert_equal(one: Run, two: Run, *, norm: float = LOSS) -> None:
    """Compare two runs: the steps of both, and the weights that they end with."""
    close = {"loss": LOSS, "grad_norm": norm, "eval_loss": HELD_OUT, "learning_rate": 0.0}
    for row, other in zip(one.rows(), two.rows(), strict=True):
        numbers, others = row.as_columns(), other.as_columns()
        for name in close.keys() & numbers.keys():
            assert math.isclose(others[name], numbers[name], rel_tol=close[name]), (row.step, name)

    weights, others = (tensors(run.model if run.model.is_dir() else run.adapter) for run in (one, two))
    assert weights.keys() == others.keys()
    difference = torch.cat([(weights[name] - others[name]).flatten() for name in weights]).norm()
    assert difference <= WEIGHTS * torch.cat([part.flatten() for part in weights.values()]).norm()


@pytest.mark.parametrize("changes", [{"targets": ["attention"]}, {"method": "full", "keep": "best"}], ids=str)
def test_two_processes_equal_one(changes: dict[str, Any], small_model: Path, tmp_path: Path) -> None:
    config = settings(small_model, tmp_path, "one", **changes)
    assert in_processes(1, train, config) == [None]
    for strategy in STRATEGIES:
        divided = settings(small_model, tmp_path, strategy, **changes, strategy=strategy)
        divided = divided.model_copy(update={"batch_size": 2})
        assert in_processes(2, train_divided, divided) == [None, None]
        norm = NORM_OF_ALL if "method" in changes else LOSS
        assert_equal(Run(tmp_path / "one"), Run(tmp_path / strategy), norm=norm)


def spoken(model: Path) -> str:
    """Return the answer of a model to a question of its training, as `hymba-tune chat` gives it."""
    config = ChatConfig(model=str(model), dtype="float32", temperature=0, max_new_tokens=12)
    return ChatSession(config).chats[0].reply("I see one cats. What do I see?")


def resumed(folder: Path, processes: int, **changes: Any) -> SFTConfig:
    return for_processes(resume_config(SFTConfig(resume=folder, **changes)), processes)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_killed_run_resumes_in_another_number_of_processes(strategy: str, small_model: Path, tmp_path: Path) -> None:
    assert in_processes(1, train, settings(small_model, tmp_path, "whole")) == [None]
    config = settings(small_model, tmp_path, "stopped", strategy=strategy).model_copy(update={"batch_size": 2})
    assert all(isinstance(end, Exception) for end in in_processes(2, train_divided, config, 3))
    run = Run(tmp_path / "stopped")
    assert run.last_checkpoint().name == "checkpoint-2"

    alone = resumed(run.path, 1, strategy="ddp")
    assert (alone.batch_size, alone.grad_accum) == (2, 2)
    assert in_processes(1, train, alone) == [None]
    assert_equal(Run(tmp_path / "whole"), run, norm=NORM_OF_OTHER_BATCHES)

    if strategy == "zero3":
        merge(MergeConfig(model=str(run.path), out=tmp_path / "merged", dtype="float32"), silent)
        texts = [spoken(path) for path in (run.path, tmp_path / "merged", tmp_path / "whole")]
        assert texts[0] == texts[1] == texts[2] != ""


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_run_of_one_process_resumes_in_two(strategy: str, small_model: Path, tmp_path: Path) -> None:
    assert in_processes(1, train, settings(small_model, tmp_path, "whole")) == [None]
    assert in_processes(1, train, settings(small_model, tmp_path, "short", steps=2)) == [None]
    run = Run(tmp_path / "short")
    both = resumed(run.path, 2, strategy=strategy, steps=4)
    assert (both.batch_size, both.grad_accum) == (2, 1)
    assert in_processes(2, train_divided, both) == [None, None]
    assert_equal(Run(tmp_path / "whole"), run)


def test_strategy_that_was_not_set_up_ends_the_run(small_model: Path, tmp_path: Path) -> None:
    config = settings(small_model, tmp_path, "out", strategy="fsdp").model_copy(update={"batch_size": 2})
    for error in in_processes(2, train, config):
        assert isinstance(error, ConfigError)
        assert "--strategy fsdp is not what Accelerate has set up: MULTI_CPU, 2 of 2 processes." in str(error)
    assert not (tmp_path / "out").exists()

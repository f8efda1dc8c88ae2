"""A run that is killed at any moment and gone on with ends with the weights it would have had, bit for bit."""

from __future__ import annotations

import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from hymba_tune.config import SFTConfig
from hymba_tune.train.run import Run
from tests.runs import same_tensors, settings
from tests.train.lives import LIFE_SECONDS, MOMENTS, live, outlive

KILLS, STEPS = 10, 24
CHANGES: dict[str, Any] = {"steps": STEPS, "save_every": 2, "eval_every": 3, "lora_dropout": 0.2, "grad_accum": 2}


@pytest.fixture(scope="module")
def whole(small_model: Path, questions: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that nothing happened to."""
    out = tmp_path_factory.mktemp("kill") / "whole"
    assert outlive(settings(small_model, questions, out, **CHANGES)) == 0
    return Run(out)


def next_life(config: SFTConfig) -> SFTConfig:
    """From the last checkpoint, or from the beginning where a run was killed before its first."""
    assert config.out is not None
    if Run(config.out).newest_checkpoint():
        return SFTConfig(resume=config.out)
    shutil.rmtree(config.out, ignore_errors=True)
    return config


def check_same(killed: Run, whole: Run) -> None:
    assert same_tensors(killed.adapter, whole.adapter)
    numbers = [[(row.step, row.loss, row.eval_loss, row.grad_norm) for row in run.rows()] for run in (killed, whole)]
    assert numbers[0] == numbers[1]
    facts = [{name: run.facts()[name] for name in ("steps", "tokens_seen", "kept", "data")} for run in (killed, whole)]
    assert facts[0] == facts[1]
    names = [{path.name for path in run.path.iterdir()} - {"log.txt"} for run in (killed, whole)]
    assert names[0] == names[1]  # nothing half-written is left


def test_killed_ten_times_at_random(whole: Run, small_model: Path, questions: Path, tmp_path: Path) -> None:
    config = settings(small_model, questions, tmp_path / "killed", **CHANGES)
    chance = random.Random(4)
    for _ in range(KILLS):
        process, steps = live(next_life(config))
        for _ in range(chance.randrange(1, 6)):
            if not steps.poll(LIFE_SECONDS) or steps.recv() == STEPS:
                break
        time.sleep(chance.uniform(0, 0.05))  # anywhere within the next step, evaluation or checkpoint
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert outlive(next_life(config)) == 0
    check_same(Run(tmp_path / "killed"), whole)


def test_killed_at_every_kind_of_moment(whole: Run, small_model: Path, questions: Path, tmp_path: Path) -> None:
    config = settings(small_model, questions, tmp_path / "killed", **CHANGES)
    for moment in MOMENTS:
        assert outlive(next_life(config), moment) == -signal.SIGKILL, moment
        assert Run(tmp_path / "killed").newest_checkpoint()  # of which the next life makes something
    assert outlive(next_life(config)) == 0
    check_same(Run(tmp_path / "killed"), whole)

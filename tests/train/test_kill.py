"""A run that is killed at any moment and resumed ends with the weights of an uninterrupted run, bit for bit."""

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
from tests.train.processes import CRASHES, TIMEOUT_SECONDS, run_to_exit, start_process

KILLS, STEPS = 10, 24
CHANGES: dict[str, Any] = {"steps": STEPS, "save_every": 2, "eval_every": 3, "lora_dropout": 0.2, "grad_accum": 2}


@pytest.fixture(scope="module")
def uninterrupted(small_model: Path, questions: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("kill") / "uninterrupted"
    assert run_to_exit(settings(small_model, questions, out, **CHANGES)) == 0
    return Run(out)


def restarted(config: SFTConfig) -> SFTConfig:
    """Settings that resume from the last checkpoint, or start again where a run was killed before its first."""
    assert config.out is not None
    if Run(config.out).newest_checkpoint():
        return SFTConfig(resume=config.out)
    shutil.rmtree(config.out, ignore_errors=True)
    return config


def check_same(killed: Run, uninterrupted: Run) -> None:
    assert same_tensors(killed.adapter, uninterrupted.adapter)
    numbers = [
        [(row.step, row.loss, row.eval_loss, row.grad_norm) for row in run.rows()] for run in (killed, uninterrupted)
    ]
    assert numbers[0] == numbers[1]
    facts = [
        {name: run.facts()[name] for name in ("steps", "tokens_seen", "kept", "data")}
        for run in (killed, uninterrupted)
    ]
    assert facts[0] == facts[1]
    names = [{path.name for path in run.path.iterdir()} - {"log.txt"} for run in (killed, uninterrupted)]
    assert names[0] == names[1]  # nothing half-written is left


def test_killed_ten_times_at_random(uninterrupted: Run, small_model: Path, questions: Path, tmp_path: Path) -> None:
    config = settings(small_model, questions, tmp_path / "killed", **CHANGES)
    chance = random.Random(4)
    for _ in range(KILLS):
        process, steps = start_process(restarted(config))
        for _ in range(chance.randrange(1, 6)):
            if not steps.poll(TIMEOUT_SECONDS) or steps.recv() == STEPS:
                break
        time.sleep(chance.uniform(0, 0.05))  # anywhere within the next step, evaluation or checkpoint
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert run_to_exit(restarted(config)) == 0
    check_same(Run(tmp_path / "killed"), uninterrupted)


def test_killed_at_every_kind_of_moment(uninterrupted: Run, small_model: Path, questions: Path, tmp_path: Path) -> None:
    config = settings(small_model, questions, tmp_path / "killed", **CHANGES)
    for moment in CRASHES:
        assert run_to_exit(restarted(config), moment) == -signal.SIGKILL, moment
        assert Run(tmp_path / "killed").newest_checkpoint()  # which the next process resumes from
    assert run_to_exit(restarted(config)) == 0
    check_same(Run(tmp_path / "killed"), uninterrupted)

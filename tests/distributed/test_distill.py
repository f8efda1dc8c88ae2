"""Two processes distill as one does, and compute a teacher's targets together."""

from __future__ import annotations

import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from hymba_tune.config import DistillCaptureConfig, DistillConfig
from hymba_tune.distill import cache
from hymba_tune.distill.cache import is_full
from hymba_tune.distill.capture import run_capture
from hymba_tune.distill.run import run_distill
from hymba_tune.footprint import Footprint
from hymba_tune.train import flow
from hymba_tune.train.memory_estimate import MemoryEstimate
from hymba_tune.train.run import Run
from hymba_tune.train.screen import Screen
from tests.distill.runs import random_teacher, settings
from tests.distill.teachers import random_model, save_teacher
from tests.distributed.processes import in_processes
from tests.runs import save_questions, tensors
from tests.train.processes import FORKS, TIMEOUT_SECONDS

pytestmark = pytest.mark.end_to_end

LOSS, HELD_OUT, WEIGHTS = 2e-6, 1e-6, 2e-7
"""Relative differences that only the order of sums makes; of the weights, that of their norms."""
ROWS = 9
"""One more than two batches of four: in an epoch's last batch one process has a row and the other one has none."""
KINDS: dict[str, dict[str, Any]] = {
    # At a rate of 1e-4 Adam amplifies the difference of the fourth step's norm to 2.1e-6.
    "cached": {"epochs": 1.3, "eval_every": 2, "lr": 5e-5},
    "cached, packed and accumulated": {"packing": True, "batch_size": 2, "grad_accum": 2, "steps": 3},
    "online": {"loss": ["jsd"], "online": True, "method": "full", "alike": True},
    "hidden": {"loss": ["kl"], "match_hidden": "cosine", "alike": True, "epochs": 1.3, "eval_every": 2},
    "on-policy": {"loss": ["kl"], "on_policy": 0.6, "batch_size": 2, "grad_accum": 2, "alike": True, "epochs": 1.3},
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def alike(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher with the student's tokenizer."""
    folder = tmp_path_factory.mktemp("alike")
    random_model("llama", 4096).save_pretrained(folder)
    for file in small_model.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def distill(config: DistillConfig) -> None:
    """Distill as one of the processes, without what takes longest: the estimate of memory, and sample answers."""
    estimate = MemoryEstimate(Footprint(0, 0, 0, 0, 0, 0), extra_bytes=0, has=1, on_gpu=False)
    with (
        patch.object(flow, "estimate_memory", return_value=estimate),
        patch.object(flow, "answer_samples", return_value=None),
        patch("hymba_tune.report.write_report"),
    ):
        run_distill(config, Screen())


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_equal_one(kind: str, small_model: Path, teacher: Path, alike: Path, tmp_path: Path) -> None:
    changes = {"batch_size": 4, "answer_tokens": 4, "lr": 1e-4} | KINDS[kind]
    teacher = alike if changes.pop("alike", False) else teacher
    data = save_questions(tmp_path / "rows.jsonl", ROWS)
    runs = []
    for processes in (1, 2):
        own = {
            **changes,
            "steps": changes.get("steps", None if "epochs" in changes else 2),
            "batch_size": changes["batch_size"] // processes,
            "eval_data": [str(save_questions(tmp_path / "held out.jsonl", 5))],
            "eval_max_rows": 5,
            "teacher_cache": tmp_path / f"targets of {processes}",
        }
        out = tmp_path / f"of {processes}"
        config = settings(small_model, teacher, data, out, **own)
        assert in_processes(processes, distill, config) == [None] * processes
        runs.append(Run(out))
    one, two = runs

    rows = list(zip(one.rows(), two.rows(), strict=True))
    assert sum(row.loss is not None for row, _ in rows) > 1
    for row, other in rows:
        for name, number in row.as_columns().items():
            if name in ("tokens_per_s", "memory_bytes"):
                continue
            close = HELD_OUT if name.startswith("eval_") else LOSS
            assert math.isclose(other.as_columns()[name], number, rel_tol=close), (row.step, name)

    folders = [run.model if run.model.is_dir() else run.adapter for run in runs]
    weights, others = map(tensors, folders)
    assert weights.keys() == others.keys()
    difference = torch.cat([(weights[name] - others[name]).flatten() for name in weights]).norm()
    assert difference <= WEIGHTS * torch.cat([part.flatten() for part in weights.values()]).norm()
    assert one.facts()["steps"] == two.facts()["steps"]
    assert contents(tmp_path / "targets of 1") == contents(tmp_path / "targets of 2")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*")}


def capture(config: DistillCaptureConfig, dies_at: dict[int, int], all_began: Any, one_died: Any) -> int:
    """Capture in shards of two rows as one of the processes; return the number of shards that this one has made.

    How many a process makes hangs on the machine's load. So each waits with its first shard for the others' first, and
    one that lives on also for another's death.

    Args:
        config: The settings.
        dies_at: The shard at which a process dies while writing it, 0 for its first one, by the process's rank.
        all_began: A barrier of all processes.
        one_died: An event that a process sets before it dies.
    """
    write, made, own = cache.write_shard, [], int(os.environ.get("RANK", "0"))

    def write_or_die(path: Path, *args: Any) -> None:
        if path.name.startswith("0"):
            if not made:
                all_began.wait(TIMEOUT_SECONDS)
                assert not dies_at or own in dies_at or one_died.wait(TIMEOUT_SECONDS)
            if dies_at.get(own) == len(made):
                path.write_bytes(b"torn")
                one_died.set()
                os.kill(os.getpid(), signal.SIGKILL)
            made.append(path)
        write(path, *args)

    with patch.object(cache, "SHARD", 2), patch.object(cache, "write_shard", write_or_die):
        run_capture(config, Screen())
    return len(made)


def captured(processes: int, config: DistillCaptureConfig, dies_at: dict[int, int]) -> list[int | str]:
    """Capture in processes; return the number of shards that each has made, "died" for one that was killed."""
    made = in_processes(processes, capture, config, dies_at, FORKS.Barrier(processes), FORKS.Event())
    return ["died" if isinstance(shards, EOFError) else shards for shards in made]


def test_targets_of_two_processes_are_those_of_one_whoever_dies(
    small_model: Path, teacher: Path, questions: Path, tmp_path: Path
) -> None:
    def config(name: str) -> DistillCaptureConfig:
        given = {"model": str(small_model), "data": [str(questions)], "device": "cpu", "top_k": 4}
        return DistillCaptureConfig(**given | random_teacher(teacher, tmp_path) | {"teacher_cache": tmp_path / name})

    assert captured(1, config("one"), {}) == [12]
    made = captured(2, config("two"), {})
    assert sum(made) == 12
    assert min(made) > 0
    assert contents(tmp_path / "two") == contents(tmp_path / "one")

    assert captured(2, config("killed"), {0: 2, 1: 1}) == ["died", "died"]
    assert len(list((tmp_path / "killed").glob("*.arrow"))) == 3
    assert len(list((tmp_path / "killed").glob("*.partial"))) == 2
    assert not is_full(tmp_path / "killed")
    assert captured(2, config("killed"), {1: 2}) == [7, "died"]
    assert contents(tmp_path / "killed") == contents(tmp_path / "one")

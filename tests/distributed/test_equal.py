"""Two processes train as one does: the same losses, gradient norms, held-out losses and weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from hymba_tune.config import DPOConfig, KTOConfig, ORPOConfig, RewardConfig, SFTConfig, TrainingConfig
from hymba_tune.train.run import Run
from tests.distributed.processes import in_processes, train
from tests.preferences import save_labeled, save_pairs
from tests.runs import save_questions, tensors

pytestmark = pytest.mark.end_to_end

LOSS, HELD_OUT, WEIGHTS = 2e-6, 1e-6, 2e-7
"""Relative differences that only the order of sums makes; of the weights, that of their norms."""
REWARD = 1e-5
"""Absolute: a reward is the difference of two sums of log-probabilities, each some hundred times as large."""
ROWS = 9
"""One more than two batches of four: in an epoch's last batch one process has a row and the other one has none."""
USUAL: dict[str, Any] = {"dtype": "float32", "device": "cpu", "rank": 4, "lr": 2e-4, "log_every": 1, "max_length": 96}
USUAL |= {"lr_schedule": "constant", "warmup": 0.0}  # after a step with a rate of 0, an accuracy is chance
ACROSS_AN_EPOCH = {"epochs": 1.3, "eval_every": 2}

KINDS: dict[str, tuple[type[TrainingConfig], int, dict[str, Any]]] = {
    "sft, padded": (SFTConfig, 4, {"packing": False, **ACROSS_AN_EPOCH}),
    "sft, packed and accumulated": (SFTConfig, 2, {"packing": True, "grad_accum": 2, "epochs": 1.5}),
    "sft, full": (SFTConfig, 4, {"packing": False, "method": "full", "steps": 2}),
    "dpo": (DPOConfig, 4, ACROSS_AN_EPOCH),
    "kto": (KTOConfig, 4, ACROSS_AN_EPOCH),
    "kto, precomputed": (KTOConfig, 4, {"reference": "precompute", "steps": 3}),
    "orpo": (ORPOConfig, 4, ACROSS_AN_EPOCH),
    "reward": (RewardConfig, 4, ACROSS_AN_EPOCH),
}
"""The settings of each kind of training, and its rows at a time, over all processes."""
SAVE: dict[type, Any] = {
    SFTConfig: save_questions,
    DPOConfig: save_pairs,
    KTOConfig: save_labeled,
    ORPOConfig: save_pairs,
    RewardConfig: save_pairs,
}


def trained(kind: str, processes: int, model: Path, folder: Path) -> Run:
    """Train in one process or in several, with the same rows in each step."""
    settings, batch, changes = KINDS[kind]
    data = SAVE[settings](folder / "rows.jsonl", ROWS)
    held_out = [str(SAVE[settings](folder / f"{name}.jsonl", rows)) for name, rows in (("one", 5), ("other", 2))]
    own = {"model": str(model), "data": [str(data)], "eval_data": held_out, "out": folder / f"of {processes}"}
    config = settings.model_validate({**USUAL, **changes, **own, "batch_size": batch // processes})
    assert in_processes(processes, train, config) == [None] * processes
    return Run(folder / f"of {processes}")


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_equal_one(kind: str, small_model: Path, tmp_path: Path) -> None:
    one, two = (trained(kind, processes, small_model, tmp_path) for processes in (1, 2))

    rows = list(zip(one.rows(), two.rows(), strict=True))
    assert sum(row.loss is not None for row, _ in rows) > 1
    for row, other in rows:
        for name, number in row.as_columns().items():
            if name in ("tokens_per_s", "memory_bytes"):
                continue
            close, floor = HELD_OUT if name == "eval_loss" else LOSS, 0.0
            if "loss" not in name and name != "grad_norm":
                floor = REWARD
            assert math.isclose(other.as_columns()[name], number, rel_tol=close, abs_tol=floor), (row.step, name)

    folders = [path.model if path.model.is_dir() else path.adapter for path in (one, two)]
    weights, others = map(tensors, folders)
    assert weights.keys() == others.keys()
    difference = torch.cat([(weights[name] - others[name]).flatten() for name in weights]).norm()
    assert difference <= WEIGHTS * torch.cat([part.flatten() for part in weights.values()]).norm()

    counts = [(run.facts()["steps"], run.facts()["tokens_seen"], run.facts()["global_batch"]) for run in (one, two)]
    assert counts[0] == counts[1]
    assert two.facts()["processes"] == 2
    assert len(two.facts()["memory"]["measured_bytes_by_rank"]) == 2

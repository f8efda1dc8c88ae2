"""Runs on preferences that take a second, of the models of `tests.runs`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

from hymba_tune.config import DPOConfig, KTOConfig, ORPOConfig, RewardConfig
from hymba_tune.train.orpo import run_orpo
from hymba_tune.train.preference import run_dpo, run_kto
from hymba_tune.train.reward import run_reward
from hymba_tune.train.run import Run
from hymba_tune.train.screen import Screen
from tests.runs import ANSWER_TOKENS

ANIMALS, NUMBERS = ("cat", "dog", "bird", "fish", "horse"), ("one", "two", "three", "four")


def pairs(count: int = 24) -> list[dict[str, Any]]:
    """Pairs of different lengths whose better answers a model learns to prefer in a few steps."""
    rows = []
    for i in range(count):
        number, animal, other = NUMBERS[i % 4], ANIMALS[i % 5], ANIMALS[(i + 1) % 5]
        prompt = f"I see {number} {animal}s" + ", as you do" * (i % 3) + ". What do I see?"
        rows.append(
            {"prompt": prompt, "chosen": f"You see {number} {animal}s.", "rejected": f"Some {other}s, I think."}
        )
    return rows


def save_pairs(path: Path, count: int = 24) -> Path:
    """The pairs as a file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in pairs(count)))
    return path


def save_labeled(path: Path, count: int = 24) -> Path:
    """The better answers of some pairs and the worse ones of others."""
    rows = [
        {"prompt": row["prompt"], "completion": row["chosen" if good else "rejected"], "label": good}
        for row, good in zip(pairs(count), [True, False, True] * count, strict=False)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


USUAL: dict[str, Any] = {"dtype": "float32", "rank": 4, "lr": 1e-2, "batch_size": 4, "steps": 2, "log_every": 1}


RUNS: dict[type, Any] = {DPOConfig: run_dpo, KTOConfig: run_kto, ORPOConfig: run_orpo, RewardConfig: run_reward}


def run_short(config: DPOConfig | KTOConfig | ORPOConfig | RewardConfig, screen: Screen | None = None) -> Run:
    """A run with short sample answers."""
    with patch("hymba_tune.train.samples.SAMPLE_TOKENS", ANSWER_TOKENS):
        return RUNS[type(config)](config, screen or Screen())


def dpo(model: Path, data: Path, out: Path, screen: Screen | None = None, **changes: Any) -> Run:
    """Two steps of DPO by default."""
    return run_short(DPOConfig(**{"model": str(model), "data": [str(data)], "out": out} | USUAL | changes), screen)


def kto(model: Path, data: Path, out: Path, screen: Screen | None = None, **changes: Any) -> Run:
    """Two steps of KTO by default."""
    return run_short(KTOConfig(**{"model": str(model), "data": [str(data)], "out": out} | USUAL | changes), screen)


def orpo(model: Path, data: Path, out: Path, screen: Screen | None = None, **changes: Any) -> Run:
    """Two steps of ORPO by default."""
    return run_short(ORPOConfig(**{"model": str(model), "data": [str(data)], "out": out} | USUAL | changes), screen)


def reward(model: Path, data: Path, out: Path, screen: Screen | None = None, **changes: Any) -> Run:
    """Two steps of a reward model by default."""
    return run_short(RewardConfig(**{"model": str(model), "data": [str(data)], "out": out} | USUAL | changes), screen)

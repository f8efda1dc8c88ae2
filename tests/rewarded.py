"""Runs of GRPO that take a second, of the models of `tests.runs`."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

from hymba_tune.config import GRPOConfig
from hymba_tune.train.grpo import run_grpo
from hymba_tune.train.run import Run
from hymba_tune.train.screen import Screen

CODE = """
def letters(prompts, completions, references, tokens, **_):
    return [sum(map(str.isalpha, text)) % 7 / 7 for text in completions]
"""
"""A reward that differs between most answers, even of a random model."""


def save_reward(folder: Path) -> str:
    """A value of ``--reward``."""
    (folder / "rewards.py").write_text(CODE)
    return f"{folder / 'rewards.py'}:letters"


def run_short(config: GRPOConfig, screen: Screen | None = None, *, report: bool = False) -> Run:
    """A run without its report."""
    with nullcontext() if report else patch("hymba_tune.report.write_report"):
        finished = run_grpo(config, screen or Screen())
    assert finished is not None
    return finished


def grpo(
    model: Path, data: Path, out: Path, screen: Screen | None = None, *, report: bool = False, **changes: Any
) -> Run:
    """Two steps of 8 answers of at most 6 tokens to 2 prompts by default."""
    usual: dict[str, Any] = {"dtype": "float32", "rank": 4, "lr": 1e-2, "steps": 2, "log_every": 1, "max_length": 64}
    usual |= {"group_size": 4, "batch_size": 4, "grad_accum": 2, "max_new_tokens": 6, "eval_max_rows": 3}
    if "reward" not in changes:
        changes["reward"] = [save_reward(out.parent)]
    config = GRPOConfig(**{"model": str(model), "data": [str(data)], "out": out} | usual | changes)
    return run_short(config, screen, report=report)

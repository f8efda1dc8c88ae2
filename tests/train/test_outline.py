"""A dry run shows what the run itself shows, without loading weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from hymba_tune.config import DPOConfig
from hymba_tune.train.preference import run_dpo
from hymba_tune.train.screen import Screen
from tests.preferences import save_pairs
from tests.runs import run, settings


class Banner(Screen):
    """Remembers what it was shown."""

    def __init__(self) -> None:
        self.lines: dict[str, str] = {}

    def banner(self, lines: dict[str, str]) -> None:
        """Labels and lines."""
        self.lines |= lines


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": None, "epochs": 1.5, "grad_accum": 2, "eval_split": 0.2},
        {"packing": True, "max_length": 100, "steps": None, "epochs": 2, "batch_size": 2},
        {"method": "full", "lr_ssm": 1e-3, "optimizer": "lion", "weight_decay": 0.1},
        {"method": "dora", "quantize": "nf4", "targets": ["mlp"], "loraplus_ratio": 4},
    ],
    ids=str,
)
def test_dry_run_says_what_the_run_says(
    changes: dict[str, Any], wide_model: Path, questions: Path, tmp_path: Path
) -> None:
    dry, real = Banner(), Banner()
    config = settings(wide_model, questions, tmp_path / "out", **changes)
    with patch("hymba_tune.train.flow.open_model", side_effect=AssertionError("the weights are loaded")):
        run(config.model_copy(update={"dry_run": True}), dry)
    assert not (tmp_path / "out").exists()
    run(config, real)
    assert dry.lines == real.lines


def test_dry_run_of_a_continued_adapter(finished_run: Path, tmp_path: Path) -> None:
    """Its reference is not computed either."""
    dry, real = Banner(), Banner()
    values: dict[str, Any] = {"model": str(finished_run), "data": [str(save_pairs(tmp_path / "pairs.jsonl"))]}
    values |= {"start": "continue", "steps": 1, "dtype": "float32", "out": tmp_path / "out", "max_length": 64}
    assert run_dpo(DPOConfig(**values, dry_run=True), dry) is None
    with patch("hymba_tune.train.samples.SAMPLE_TOKENS", 4), patch("hymba_tune.report.write_report"):
        run_dpo(DPOConfig(**values), real)
    assert dry.lines == real.lines

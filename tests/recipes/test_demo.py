"""The packaged demo keeps its promise, whatever the seed and the number format."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import patch

import pytest

from hymba_tune.cli.settings import combine
from hymba_tune.config import SFTConfig
from hymba_tune.train.screen import Screen
from hymba_tune.train.sft import run_sft

pytestmark = pytest.mark.end_to_end

FORMATS = ("float32", "bfloat16")
DEFAULT = {(0, "float32"), (1, "bfloat16")}
"""Two seeds and both formats, each run a good minute of one core; the other pairs are slow."""
RUNS = [
    pytest.param(seed, dtype, marks=() if (seed, dtype) in DEFAULT else pytest.mark.slow)
    for seed in range(4)
    for dtype in FORMATS
]


@pytest.mark.parametrize(("seed", "dtype"), RUNS)
def test_demo_answers_held_out_questions(seed: int, dtype: str, tmp_path: Path) -> None:
    config = combine("demo", SFTConfig(out=tmp_path / "out", seed=seed, dtype=dtype))
    assert config.steps is not None
    config.eval_every = config.steps  # the losses on the way cost time and change nothing
    with patch("hymba_tune.report.write_report"):
        finished = run_sft(config, Screen())
    answers = finished.facts()["answers"]
    assert (answers["questions"], answers["before"]) == (56, 0)
    assert answers["after"] >= 50
    timetable, price, duration = json.loads((finished.path / "samples.json").read_text())
    for sample in timetable, price, duration:
        assert sample["before"] != sample["reference"]
    assert timetable["after"] == timetable["reference"]

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from hymba_tune.cli.settings import combine
from hymba_tune.config import DistillConfig, GRPOConfig, PreferenceConfig, SFTConfig, TrainingConfig
from hymba_tune.train.run import Run
from tests import rewarded
from tests.conftest import ROOT
from tests.distill import runs as distillation
from tests.distill.teachers import save_teacher
from tests.preferences import run_short, save_pairs
from tests.runs import run

RUNS: dict[type[TrainingConfig], Callable[[Any], Run]] = {
    SFTConfig: run,
    DistillConfig: distillation.run,
    GRPOConfig: rewarded.run_short,
}
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def kind_of(path: Path) -> type[TrainingConfig]:
    """The settings of the verb that a recipe is for."""
    return TrainingConfig.of(yaml.safe_load(path.read_text()).get("verb", "sft"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_says_what_it_needs(path: Path) -> None:
    comment = [line for line in path.read_text().splitlines() if line.startswith("#")]
    verb = kind_of(path).verb
    assert f"#   hymba-tune {verb} --config {path.stem}" in "\n".join(comment)
    for label in ("hardware", "memory", "time"):
        assert any(re.fullmatch(rf"# {label}: +\S.*", line) for line in comment), f"no {label}"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_sets_only_known_settings(path: Path) -> None:
    given, kind = yaml.safe_load(path.read_text()), kind_of(path)
    given.pop("verb", None)
    assert combine(path.stem, kind()) == kind(**given)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_runs_two_steps(path: Path, small_model: Path, questions: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"dtype": "float32", "steps": 2, "max_length": 64}
    kind = kind_of(path)
    if kind is DistillConfig:
        changes |= distillation.random_teacher(save_teacher(tmp_path / "teacher"), tmp_path)
    if kind is GRPOConfig:
        changes |= {"reward": [rewarded.save_reward(tmp_path)], "max_new_tokens": 4}
    paired = issubclass(kind, PreferenceConfig)
    data = save_pairs(tmp_path / "pairs.jsonl") if paired else questions
    changes |= {"model": str(small_model), "data": [str(data)], "eval_data": [str(data)]}
    config = combine(path.stem, kind(out=tmp_path / "out", **changes))
    finished = (run_short if paired else RUNS[kind])(config)
    assert finished.facts()["steps"] == 2
    assert len(list(finished.evaluations())) > 1

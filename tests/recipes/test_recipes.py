from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from hymba_tune.cli.settings import combine
from hymba_tune.config import SFTConfig
from tests.conftest import ROOT
from tests.runs import run

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_says_what_it_needs(path: Path) -> None:
    comment = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert f"#   hymba-tune sft --config {path.stem}" in "\n".join(comment)
    for label in ("hardware", "memory", "time"):
        assert any(re.fullmatch(rf"# {label}: +\S.*", line) for line in comment), f"no {label}"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_sets_only_known_settings(path: Path) -> None:
    given = yaml.safe_load(path.read_text())
    assert combine(path.stem, SFTConfig()) == SFTConfig(**given)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_runs_two_steps(path: Path, small_model: Path, questions: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"dtype": "float32", "steps": 2, "max_length": 64, "eval_data": []}
    flags = SFTConfig(model=str(small_model), data=[str(questions)], out=tmp_path / "out", **changes)
    finished = run(combine(path.stem, flags))
    assert finished.facts()["steps"] == 2
    assert len(list(finished.evaluations())) > 1

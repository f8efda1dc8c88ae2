from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft7Validator

from hymba_tune.cli.settings import combine_for
from hymba_tune.config import SFTConfig, TrainingConfig
from hymba_tune.errors import ConfigError
from hymba_tune.files import read_yaml
from hymba_tune.recipes.schema import recipe_schema
from tests.conftest import ROOT

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
SCHEMA = recipe_schema()


def accepts(settings: Any) -> bool:
    """Whether the schema accepts a recipe."""
    valid: bool = Draft7Validator(SCHEMA).is_valid(settings)
    return valid


def reads(path: Path) -> bool:
    """Whether the command line accepts a recipe."""
    try:
        combine_for(str(path), SFTConfig(), None)
    except ConfigError:
        return False
    return True


def test_schema_is_one() -> None:
    Draft7Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_schema_accepts_packaged_recipes(path: Path) -> None:
    settings = read_yaml(path)
    assert accepts(settings)
    assert not accepts({**settings, "rnk": 4})


def test_every_setting_has_its_type_default_and_description() -> None:
    for verb, kind in TrainingConfig.by_verb().items():
        properties = SCHEMA["definitions"][f"hymba-tune-{verb}"]["properties"]
        assert properties.keys() == {"verb", *kind.model_fields}
        for name in kind.model_fields:
            setting = properties[name]
            setting = SCHEMA["definitions"][name] if "$ref" in setting else setting
            assert setting["description"], name
            assert "default" in setting, name
            assert {"type", "anyOf", "enum"} & setting.keys(), name
            assert Draft7Validator(setting).is_valid(setting["default"]), name


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ("rank: 4", True),
        ("map: {prompt: question}\nnproc: auto\ntrack: [wandb]\nlr: 1.0e-4\nquantize: nf4\nmethod: dora", True),
        ("map: [prompt=question]\nnproc: 2\nweights: [0.5, 2]\ndata: [a.jsonl]\nrendezvous: a:1\nlr: null", True),
        ("verb: distill\nteacher: llama-3.2-3b\nstages: [0.7, {share: 0.3, on_policy: 1}]", True),
        ("verb: grpo\nreward: [gsm8k]\ngroup_size: 4", True),
        ("rnk: 4", False),
        ("rank: 0", False),
        ("rank: 1.5", False),
        ("rank: yes", False),
        ("rank: 5000000000", False),
        ("method: lara", False),
        ("quantize: int4", False),
        ("track: [mlflo]", False),
        ("warmup: 1", False),
        ("lr: 0", False),
        ("lr: fast", False),
        ("weights: [1001]", False),
        ("data: a.jsonl", False),
        ("packing: 3", False),
        ("device: tpu", False),
        ("map: [prompt]", False),
        ("nproc: 0", False),
        ("rendezvous: a", False),
        ("verb: chat", False),
        ("verb: sft\nbeta: 0.1", False),
        ("verb: dpo\nloss: sigmoyd", False),
        ("[rank]", False),
    ],
)
def test_schema_and_command_line_agree(text: str, valid: bool, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert (accepts(read_yaml(path)), reads(path)) == (valid, valid)


def test_a_recipe_without_a_verb_has_the_settings_of_one() -> None:
    assert accepts({"beta": 0.1})
    assert not accepts({"beta": 0.1, "group_size": 8, "teacher": "x"})

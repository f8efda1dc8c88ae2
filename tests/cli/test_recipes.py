from __future__ import annotations

from pathlib import Path

import pytest

from hymba_tune.config import TrainingConfig
from hymba_tune.files import read_yaml
from hymba_tune.recipes import packaged
from hymba_tune.recipes.schema import SCHEMA_FILE
from tests.cli.conftest import Command
from tests.conftest import ROOT


def test_recipes_are_listed_with_what_they_are_for_and_need(command: Command) -> None:
    listed = command("recipes")
    assert listed.code == 0
    assert command("recipes", "list") == listed
    for recipe in packaged():
        assert all((recipe.what, recipe.memory, recipe.data)), recipe.name
        assert f"\n  {recipe.command}\n" in listed.out
        assert recipe.command.startswith(
            f"hymba-tune {TrainingConfig.of(read_yaml(recipe.path)['verb']).verb} --config"
        )
    assert "(estimated, not measured)" in listed.out
    assert max(map(len, listed.out.splitlines())) <= 80


def test_shown_recipe_is_its_file(command: Command) -> None:
    shown = command("recipes", "sft_lora")
    assert shown.out.startswith("# Teach Hymba-1.5B to answer as your data does")
    assert command("recipes", "show", "sft_lora") == shown
    assert command("recipes", "sft_lora", "kto").out == shown.out + command("recipes", "kto").out


def test_printed_schema_is_the_packaged_one(command: Command) -> None:
    """To renew it: hymba-tune recipes --schema > new.json, then move that to recipes/hymba-recipe.schema.json."""
    printed = command("recipes", "--schema").out
    assert printed == (ROOT / "recipes" / SCHEMA_FILE).read_text(encoding="utf-8")


def test_copied_recipe_is_well_formed_and_not_overwritten(tmp_path: Path, command: Command) -> None:
    target = tmp_path / "my.yaml"
    assert command("recipes", "copy", "sft_lora", target).code == 0
    checked = command("recipes", "validate", target)
    assert "well-formed" in checked.out
    assert f"hymba-tune sft --config {target}" in checked.out
    target.write_text("rank: 1\n")
    again = command("recipes", "copy", "sft_lora", target)
    assert again.code == 2
    assert f"{target} exists.\n" in again.err
    assert target.read_text() == "rank: 1\n"


def test_recipe_copied_where_nothing_can_be(tmp_path: Path, command: Command) -> None:
    failed = command("recipes", "copy", "sft_lora", tmp_path / "no" / "folder.yaml")
    assert failed.code == 2
    assert "there is no folder" in failed.err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rnk: 4", "did you mean rank?"),
        ("rank: 0", "--rank 0: must be at least 1 (common: 8 to 64)"),
        ("verb: chat", "verb is 'chat', expected one of sft"),
    ],
)
def test_recipe_that_is_wrong(text: str, message: str, tmp_path: Path, command: Command) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    failed = command("recipes", "validate", path)
    assert failed.code == 2
    assert message in failed.err

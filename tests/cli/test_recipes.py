from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Command


def test_recipes_are_listed_with_a_line_each(command: Command) -> None:
    listed = command("recipes")
    assert listed.code == 0
    assert command("recipes", "list") == listed
    assert "sft_full" in listed.out
    assert "(not measured)" in listed.out


def test_shown_recipe_is_its_file(command: Command) -> None:
    assert command("recipes", "show", "sft_lora").out.startswith("# LoRA on every projection")


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

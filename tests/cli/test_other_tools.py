"""Names of other fine-tuning tools: each is answered with the one to use here."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import pytest
from cyclopts import App

from hymba_tune.cli.main import VERBS, app
from hymba_tune.cli.other_tools import OTHER_FLAGS, OTHER_VALUES, OTHER_VERBS, nearest_value
from hymba_tune.cli.settings import combine
from hymba_tune.config import SFTConfig
from hymba_tune.errors import ConfigError
from tests.cli.conftest import Command

USUAL = {
    "--learning-rate 1e-4": "--lr",
    "--learning_rate=1e-4": "--lr",
    "--num-epochs 3": "--epochs",
    "--num-train-epochs 3": "--epochs",
    "--output-dir out": "--out",
    "--lora-r 8": "--rank",
    "--per-device-train-batch-size 4": "--batch-size",
    "--gradient-accumulation-steps 4": "--grad-accum",
    "--max-seq-length 512": "--max-length",
    "--lr-scheduler-type cosine": "--lr-schedule",
    "--model-name-or-path me/model": "--model",
    "--load-in-4bit": "--quantize nf4",
    "--fp16": "--dtype float16",
    "--use-dora": "--method dora",
}


@pytest.mark.parametrize("words", USUAL)
def test_flag_of_another_tool_is_answered_with_the_own_one(words: str, command: Command) -> None:
    result = command("sft", "--data", "demo", *words.split())
    flag = words.split()[0].split("=")[0]
    assert (result.code, result.err) == (2, f"There is no flag {flag}.\n  to fix     {USUAL[words]}\n")


def test_all_flags_of_another_tool_are_answered_at_once(command: Command) -> None:
    result = command("sft", "demo", "--lora-r", "8", "--lora-dropout", "0.1", "--output-dir", "x", "--rank", "0")
    assert (
        result.err
        == "There are no flags --lora-r, --output-dir.\n  to fix     --rank for --lora-r, --out for --output-dir\n"
    )


def flags_of(verb: App) -> set[str]:
    own = verb.assemble_argument_collection() if verb.default_command else ()
    below = chain.from_iterable(flags_of(verb[name]) for name in verb if not name.startswith("-"))
    return {name for argument in own for name in argument.names} | set(below)


def test_every_answer_is_a_flag_or_a_verb() -> None:
    known = set(chain.from_iterable(flags_of(app[verb]) for verb in VERBS))
    assert {own.split()[0] for owns in OTHER_FLAGS.values() for own in owns} <= known
    assert {usual.split()[0] for usuals in OTHER_VERBS.values() for usual in usuals} <= set(VERBS)
    assert OTHER_VERBS.keys() & set(VERBS) == set()
    for other, owns in OTHER_FLAGS.items():
        assert f"--{other.replace('_', '-')}" not in {own.split()[0] for own in owns}


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ("--optimizer adam", "adamw"),
        ("--optimizer ADAMW", "adamw"),
        ("--optimizer adamw_torch", "adamw"),
        ("--optimizer paged_adamw_8bit", "paged-adamw8bit"),
        ("--dtype fp16", "float16"),
        ("--quantize 4bit", "nf4"),
        ("--quantize 8bit", "int8"),
        ("--lr-schedule constant_with_warmup", "constant"),
        ("--lr-schedule inverse_sqrt", "inverse-sqrt"),
        ("--method qlora", "lora"),
    ],
)
def test_value_of_another_tool_is_answered_with_the_nearest(words: str, value: str, command: Command) -> None:
    result = command("sft", "--data", "demo", *words.split())
    assert result.code == 2
    assert result.err.endswith(f"\n  to fix     {words.split()[0]} {value}\n")


def test_value_that_resembles_none_is_answered_with_all(command: Command) -> None:
    assert "to fix" not in command("sft", "--data", "demo", "--method", "xyz").err
    assert nearest_value("xyz", ["lora", "full"]) == ""
    assert all(owns for owns in OTHER_VALUES.values())


@pytest.mark.parametrize(
    ("line", "fix"),
    [("learning_rate: 1", "lr: …"), ("lora_r: 8", "rank: …"), ("load_in_4bit: true", "quantize: nf4")],
)
def test_key_of_another_tool_in_a_recipe_is_answered_with_the_own_one(line: str, fix: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(line)
    with pytest.raises(ConfigError, match=rf"there is no setting '\w+'\.\n  to fix     {fix}$"):
        combine(str(recipe), SFTConfig())

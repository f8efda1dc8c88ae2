from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from hymba_tune.cli.main import app
from hymba_tune.config import DPOConfig, SFTConfig, TrainingConfig
from hymba_tune.report import RunRecord
from hymba_tune.report.commands import next_commands, repeat
from tests.report.inputs import write_run

SETTINGS: dict[str, dict[str, Any]] = {
    "none": {},
    "values": {"rank": 8, "lr": 1e-5, "steps": 7, "dtype": "bfloat16", "method": "dora", "lora_alpha": 3.5},
    "switches": {"packing": True, "gradient_checkpointing": True},
    "lists": {
        "targets": ["in_proj", "x_proj.0"],
        "map": ["prompt=the question", "role.bot=assistant"],
        "track": ["wandb"],
    },
    "quotes": {"data": ["my data's.jsonl", "$HOME/*.jsonl"], "model": "a folder/`x`"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_repeating_asks_for_the_same_settings(name: str, tmp_path: Path) -> None:
    config = SFTConfig.model_validate({"model": "hymba-nano", "data": ["demo"], **SETTINGS[name]})
    written = config.model_dump(mode="json", exclude={"out", "resume"}, exclude_none=True)
    run = write_run(tmp_path / "run", settings=written)
    _, bound, _ = app.parse_args(shlex.split(repeat(RunRecord.read(run)))[1:])
    assert bound.arguments["flags"] == config


def test_repeating_a_run_of_preferences_asks_for_the_same_settings(tmp_path: Path) -> None:
    config = DPOConfig(model="hymba-nano", data=["pairs.jsonl"], beta=0.3, rank=8)
    written = {"verb": "dpo", **config.model_dump(mode="json", exclude={"out", "resume"}, exclude_none=True)}
    line = repeat(RunRecord.read(write_run(tmp_path / "run", settings=written)))
    assert line == "hymba-tune dpo --model hymba-nano --data pairs.jsonl --rank 8 --beta 0.3"
    _, bound, _ = app.parse_args(shlex.split(line)[1:])
    assert bound.arguments["flags"] == config


def test_defaults_are_not_repeated(finished_run: Path, small_model: Path, questions: Path) -> None:
    assert repeat(RunRecord.read(finished_run)) == shlex.join(
        [
            *("hymba-tune", "sft", "--model", str(small_model), "--dtype", "float32"),
            *("--data", str(questions), "--eval-split", "0.2"),
            *("--rank", "4", "--steps", "30", "--batch-size", "4", "--lr", "0.01"),
            *("--eval-every", "10", "--log-every", "5"),
        ]
    )


def test_a_switch_that_is_off_is_said(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", settings={"verb": "distant", "packing": False})
    assert repeat(RunRecord.read(run)) == "hymba-tune distant --model hymba-nano --data demo --no-packing"


def test_next_commands_are_those_that_can_be_done(finished_run: Path, tmp_path: Path) -> None:
    assert next_commands(RunRecord.read(write_run(tmp_path / "begun"))) == {}
    assert next_commands(RunRecord.read(finished_run)) == {
        "resume it": f"hymba-tune sft --resume {finished_run}",
        "chat with it": f"hymba-tune chat {finished_run}",
        "merge it into one model": f"hymba-tune merge {finished_run} --out finished-merged",
    }


def test_settings_of_the_run_are_read_without_its_verb(finished_run: Path) -> None:
    record = RunRecord.read(finished_run)
    assert record.verb.name == "sft"
    assert TrainingConfig.of("sft").model_validate(record.settings)
    assert "verb" in yaml.safe_load((finished_run / "config.yaml").read_text())

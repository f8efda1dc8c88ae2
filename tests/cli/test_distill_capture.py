"""`hymba-tune distill capture`: what it says when it is done, and what it takes from a recipe."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from cyclopts import App

from hymba_tune.cli.distill_capture import capture
from hymba_tune.errors import ConfigError
from tests.distill.teachers import save_teacher


@pytest.fixture
def app() -> App:
    made = App(result_action="return_value")
    made.command(capture)
    return made


def test_says_where_the_targets_are_and_what_they_take(
    app: App, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["capture", "--model", "hymba-nano", "--teacher", str(save_teacher(tmp_path / "teacher"))]
    words += ["--data", str(questions), "--teacher-cache", str(tmp_path / "targets"), "--min-teacher-probability", "0"]
    words += ["--min-end-probability", "0", "--top-k", "4"]
    app(words)
    out = " ".join(capsys.readouterr().out.split())
    assert f"targets of 24 rows are in {tmp_path / 'targets'}" in out
    assert "bytes a token" in out
    assert "next hymba-tune distill" in out

    recipe = {"verb": "distill", "model": "hymba-nano", "teacher": str(tmp_path / "teacher"), "data": [str(questions)]}
    recipe |= {"min_teacher_probability": 0, "min_end_probability": 0, "top_k": 8, "method": "lora", "epochs": 2}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    app(
        ["capture", "--config", str(tmp_path / "recipe.yaml"), "--top-k", "4", "--teacher-cache", str(tmp_path / "own")]
    )
    one, other = ({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("targets", "own"))
    assert one == other


@pytest.mark.parametrize(
    ("recipe", "message"),
    [("verb: sft", "is for hymba-tune sft"), ("verb: distill\nlrr: 1", "there is no setting 'lrr'")],
)
def test_takes_recipes_of_distill_only(app: App, recipe: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(recipe)
    with pytest.raises(ConfigError, match=message):
        app(["capture", "--config", str(tmp_path / "recipe.yaml"), "--data", "rows.jsonl"])

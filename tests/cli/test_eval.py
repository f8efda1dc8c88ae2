from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from hymba_tune.checkpoint import load_weights
from tests.cli.conftest import Command
from tests.cli.inputs import assert_plain

COMMON = ["--dtype", "float32", "--max-rows", 4]


def test_comparison_of_a_run_with_its_base_is_in_its_report(
    command: Command, finished_run: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished_run, "mine")
    Path("data.jsonl").symlink_to(questions)
    files = ["--out", "results.json", "--save-answers", "answers.jsonl"]
    questions_flags = ["--data", "data.jsonl", "--answers", "exact", "--max-new-tokens", 6, "--base"]
    result = command("eval", "mine", *questions_flags, *COMMON, *files)
    assert_plain(result)
    mine, base = json.loads(Path("results.json").read_text())["models"]
    assert mine["name"] == "mine"
    assert mine["measures"]["loss"] < base["measures"]["loss"]
    assert mine["data"]["rows"] == 4
    assert {"perplexity", "bits_per_byte", "exact_match"} <= mine["measures"].keys()
    assert f"{mine['measures']['loss']:.4f}" in result.out
    assert "change" in result.out
    answers = [json.loads(line) for line in Path("answers.jsonl").read_text().splitlines()]
    assert [row["model"] for row in answers] == ["mine"] * 4 + [base["name"]] * 4
    assert answers[0]["expected"] == "You see one cats."
    again = command("eval", "mine", "--data", "data.jsonl", *COMMON, "--base")
    assert "bits a byte" in again.out
    assert "right answers" not in again.out
    assert len(json.loads(Path("mine/evaluations.json").read_text())) == 2
    page = Path("mine/report.html").read_text()
    assert "<h2>Evaluations</h2>" in page
    assert f"{base['measures']['bits_per_byte']:.4f}" in page


def test_results_as_json(command: Command, small_model: Path, questions: Path) -> None:
    result = command("eval", small_model, "--data", questions, *COMMON, "--json")
    (model,) = json.loads(result.out)["models"]
    assert model["measures"]["loss"] > 1
    assert "exact_match" not in model["measures"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "Nothing to evaluate on."),
        (["--answers", "gsm8k", "--tasks", "arc_easy"], "--answers and --extract need --data"),
        (["--data", "demo", "--answers", "exact", "--extract", "x"], "--answers and --extract cannot be combined"),
        (["--data", "demo", "--save-answers", "x.jsonl"], "--save-answers needs --answers or --extract."),
        (["--data", "demo", "--base"], "has no adapter, so it has no base model"),
        (["--data", "demo", "--out", "nowhere/x.json"], "there is no folder nowhere"),
        (["--data", "nothing.jsonl"], "Cannot find nothing.jsonl."),
        (["--data", "demo", "--against", "nobody"], "no such folder"),
        (["--data", "demo", "--answers", "gsm8k"], "contains a part to compare"),
        (["--tasks", "."], "--tasks .: no task in this folder"),
    ],
)
def test_mistakes_are_reported_before_the_weights_load(
    command: Command, small_model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(f"{load_weights.__module__}.load_weights", fail)
    monkeypatch.setattr("hymba_tune.adapters.opening.load_weights", fail)
    result = command("eval", small_model, *flags)
    assert result.code == 2
    assert message in result.err


def test_folder_of_tasks_is_said_to_run_python(command: Command, small_model: Path, tmp_path: Path) -> None:
    result = command("eval", small_model, "--tasks", tmp_path)
    assert result.err.startswith(f" --tasks {tmp_path}: lm-eval runs the Python code of the tasks in this folder\n")


def test_tasks_need_lm_eval(command: Command, small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    result = command("eval", small_model, "--tasks", "arc_easy")
    assert result.code == 2
    assert "pip install 'hymba-tune[eval]'" in result.err

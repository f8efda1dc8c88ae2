"""Right answers to the held-out prompts, counted before and after training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from hymba_tune.config import EvalConfig, SFTConfig
from hymba_tune.errors import ConfigError, DataError
from hymba_tune.evaluate import evaluate
from hymba_tune.report import RunRecord, judge
from hymba_tune.train.resuming import resume_config
from hymba_tune.train.run import Run
from hymba_tune.train.screen import Screen
from tests.runs import run, settings
from tests.train.inputs import Pressing


def save_answered(path: Path, answers: Sequence[str]) -> Path:
    """Questions with these answers."""
    rows = [
        {"prompt": f"I see {number}. What do I see?", "completion": answer} for number, answer in enumerate(answers)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def counted(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that learns to say always the same, which is right in three held-out rows of four."""
    folder = tmp_path_factory.mktemp("counted")
    data = save_answered(folder / "data.jsonl", ["A cat."] * 12)
    held_out = save_answered(folder / "held-out.jsonl", ["A cat.", "A dog.", "A cat.", "A cat."] * 4)
    changes: dict[str, Any] = {"eval_data": [str(held_out)], "eval_max_rows": 8, "answers": "exact"}
    return run(settings(small_model, data, folder / "run", steps=40, **changes))


def test_right_answers_are_counted_before_and_after(counted: Run) -> None:
    answers = counted.facts()["answers"]
    changed = {"right_before": [], "gained": 6, "lost": 0}
    assert answers == {"questions": 8, "before": 0, "after": 6} | changed


def test_count_is_that_of_an_evaluation(counted: Run) -> None:
    data = [str(counted.path.parent / "held-out.jsonl")]
    config = EvalConfig(model=str(counted.path), data=data, max_rows=8, answers="exact", dtype="float32")
    (result,) = evaluate(config, Screen().working).results
    assert result.measures["exact_match"] == 6 / 8


def test_count_by_cuda_graphs_is_the_same(
    counted: Run, small_model: Path, questions: Path, tmp_path: Path, graphs: list[Any]
) -> None:
    """In an evaluation, and before and after training."""
    data = [str(counted.path.parent / "held-out.jsonl")]
    changes: dict[str, Any] = {"answers": "exact", "dtype": "float32", "cuda_graphs": True}
    config = EvalConfig(model=str(counted.path), data=data, max_rows=8, **changes)
    (result,) = evaluate(config, Screen().working).results
    assert result.measures["exact_match"] == 6 / 8
    captured = len(graphs)
    assert captured
    eval_data = {"eval_data": [str(questions)], "eval_max_rows": 4}
    trained = run(settings(small_model, questions, tmp_path, steps=1, **eval_data, **changes))
    assert trained.facts()["answers"].keys() >= {"questions", "before", "after", "gained", "lost"}
    assert len(graphs) > captured


def test_count_is_told_by_card_and_report(counted: Run) -> None:
    card = (counted.path / "README.md").read_text()
    assert "Right answers to the 8 held-out prompts: 0 before training, 6 after." in card
    verdict = judge(RunRecord.read(counted.path))
    assert verdict.sentence.endswith("; 6 of 8 answers right, 0 before.")
    assert ("right answers", "6 of 8", "0 before, better") in verdict.figures


def test_few_of_the_prompts_are_kept_as_samples(counted: Run) -> None:
    samples = json.loads((counted.path / "samples.json").read_text())
    assert len(samples) == 3


def test_run_that_was_stopped_keeps_the_count_before_it(small_model: Path, questions: Path, tmp_path: Path) -> None:
    config = settings(small_model, questions, tmp_path, eval_data=[str(questions)], answers="exact", eval_max_rows=4)
    with pytest.raises(KeyboardInterrupt):
        run(config, Pressing(1))
    stopped = Run(tmp_path)
    assert stopped.facts()["answers"] == {"questions": 4, "before": 0, "right_before": []}
    assert "answers right" not in judge(RunRecord.read(tmp_path)).sentence
    run(resume_config(SFTConfig(resume=tmp_path)))
    assert stopped.facts()["answers"].keys() >= {"questions", "before", "after", "gained", "lost"}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"answers": "exact"}, ConfigError, r"--answers: .*no held-out data is given\.(.|\n)*data split"),
        (
            {"answers": "gsm8k", "eval_data": True},
            DataError,
            r"No answer in .*questions\.jsonl contains a part to compare",
        ),
    ],
)
def test_what_cannot_be_counted_is_refused_before_the_weights_load(
    changes: dict[str, Any],
    error: type[Exception],
    message: str,
    small_model: Path,
    questions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if changes.pop("eval_data", False):
        changes["eval_data"] = [str(questions)]
    monkeypatch.setattr("hymba_tune.train.flow.open_model", None)
    with pytest.raises(error, match=message):
        run(settings(small_model, questions, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()

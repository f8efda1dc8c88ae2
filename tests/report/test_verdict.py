from __future__ import annotations

from pathlib import Path

import pytest

from hymba_tune.report import RunRecord, Verdict, judge
from tests.report.inputs import write_run


def judged(path: Path, losses: list[float], evaluations: list[float], verb: str = "sft") -> Verdict:
    return judge(RunRecord.read(write_run(path / "run", losses, evaluations, settings={"verb": verb})))


def test_better(tmp_path: Path) -> None:
    verdict = judged(tmp_path, [2.0, 1.0], [4.0, 2.0, 1.0])
    assert verdict.better
    assert verdict.sentence == "It got better: held-out loss 4.000 → 1.000 nats a token, 75 % less."
    assert verdict.figures == [
        ("held-out loss before", "4.000", "nats a token"),
        ("best", "1.000", "step 20"),
        ("last", "1.000", "step 20"),
        ("perplexity", "2.72", "54.6 before"),
    ]
    assert not verdict.notes


def test_worse(tmp_path: Path) -> None:
    verdict = judged(tmp_path, [1.0], [1.0, 1.5, 1.2])
    assert verdict.better is False
    assert verdict.sentence == "It did not get better: held-out loss 1.000 → 1.200 nats a token."


def test_rising_again_is_said(tmp_path: Path) -> None:
    (note,) = judged(tmp_path, [1.0], [2.0, 1.0, 1.5]).notes
    assert note.startswith("After step 10 the held-out loss rose again, to 1.500")


def test_a_last_evaluation_hardly_above_the_best_is_no_rise(tmp_path: Path) -> None:
    assert not judged(tmp_path, [1.0], [2.0, 1.0, 1.01]).notes


def test_accuracy_of_labeled_answers_is_shown_without_chance(tmp_path: Path) -> None:
    columns = {"eval_accuracy": [0.5, 0.78], "eval_margin": [0.1, 0.4]}
    run = write_run(tmp_path / "run", [0.6], [0.5, 0.4], settings={"verb": "kto"}, columns=columns)
    verdict = judge(RunRecord.read(run))
    assert verdict.sentence.endswith("; 78 % of the answers classified correctly.")
    assert ("answers classified correctly", "78 %", "50 % before") in verdict.figures


def test_source_that_got_worse_is_named(tmp_path: Path) -> None:
    columns = {"eval_loss/a.jsonl": [5.0, 1.0, 1.5], "eval_loss/b.jsonl": [2.0, 2.5, 1.0]}
    run = write_run(tmp_path / "run", [1.0], [3.0, 1.7, 1.71], columns=columns)
    assert judge(RunRecord.read(run)).notes == ["The held-out loss rose on some sources: b.jsonl 2.000 → 2.500."]


def test_preference_runs_report_their_pairs(tmp_path: Path) -> None:
    columns = {"eval_accuracy": [0.0, 0.78], "eval_margin": [0.0, 0.4]}
    run = write_run(tmp_path / "run", [0.6], [0.693, 0.5], settings={"verb": "dpo"}, columns=columns)
    verdict = judge(RunRecord.read(run))
    assert verdict.sentence == (
        "It got better: held-out loss 0.693 → 0.500, 28 % less; 78 % of the pairs ranked correctly."
    )
    assert verdict.figures[3:] == [
        ("pairs ranked correctly", "78 %", "50 % by chance"),
        ("margin of rewards", "0.400", "0.000 before"),
    ]


@pytest.mark.parametrize(
    ("evaluations", "why", "how"),
    [
        ([], "without held-out data", "--eval-split"),
        ([2.0], "without a second finite evaluation", "--eval-every"),
        ([2.0, float("nan")], "without a second finite evaluation", "--eval-every"),
    ],
)
def test_without_evaluations_before_and_after_nothing_is_claimed(
    tmp_path: Path, evaluations: list[float], why: str, how: str
) -> None:
    verdict = judged(tmp_path, [2.0, 1.0], evaluations)
    assert verdict.better is None
    assert verdict.sentence.startswith(f"Whether it got better is unknown {why}.")
    assert how in verdict.notes[0]

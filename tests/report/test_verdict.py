from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

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
    assert verdict.better
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


def facts_of(rows: int, vocabulary: int = 4096) -> dict[str, Any]:
    return {"held_out": {"rows": rows}, "vocabulary": vocabulary}


@pytest.mark.parametrize(("rows", "words"), [(1, "1 held-out row is"), (2, "2 held-out rows are")])
def test_few_held_out_rows_give_no_verdict(rows: int, words: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [2.0, 1.0], [4.0, 2.0, 1.0], facts=facts_of(rows))
    verdict = judge(RunRecord.read(run))
    assert verdict.better is None
    assert verdict.sentence.startswith(f"{words} too few to say whether it got better: held-out loss 4.000 → 1.000")
    assert "--eval-split" in verdict.notes[0]


def test_verdict_has_its_size(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [2.0, 1.0], [4.0, 2.0, 1.0], facts=facts_of(200))
    assert "4.000 → 1.000 nats a token on 200 rows, 75 % less" in judge(RunRecord.read(run)).sentence


def test_small_change_is_no_improvement(tmp_path: Path) -> None:
    verdict = judged(tmp_path, [2.0, 2.0], [2.0, 1.99, 1.985])
    assert verdict.better is None
    assert verdict.sentence == "It hardly changed: held-out loss 2.000 → 1.985 nats a token."


@pytest.mark.parametrize("steps", [1, 10, 20])
def test_few_steps_are_said_to_be_few(steps: int, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    rows = [{"step": 0, "eval_loss": 3.0}, {"step": steps, "loss": 2.0, "eval_loss": 2.0}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    notes = [note for note in judge(RunRecord.read(run)).notes if "few" in note]
    assert len(notes) == (steps < 20)
    assert all("--steps 100" in note for note in notes)


@pytest.mark.parametrize("verb", ["dpo", "kto", "orpo"])
def test_rising_reward_of_worse_answers_is_not_better(verb: str, tmp_path: Path) -> None:
    columns = {"eval_rejected_reward": [0.0, 0.2, 0.5], "eval_margin": [0.0, 0.3, 0.4]}
    run = write_run(tmp_path / "run", [0.6, 0.5], [0.7, 0.6, 0.5], settings={"verb": verb}, columns=columns)
    verdict = judge(RunRecord.read(run))
    assert verdict.better is None
    assert verdict.sentence.startswith("It is not clear that it got better: held-out loss 0.700 → 0.500")
    assert f"The reward of {'bad' if verb == 'kto' else 'rejected'} answers rose, 0.000 → 0.500" in verdict.notes[0]


@pytest.mark.parametrize(
    ("losses", "evaluations", "note"),
    [
        ([5.0, 8.31, 8.32, 8.318], [4.9, 8.316, 8.318], r"stuck at 8\.318, about ln\(4,096\) = 8\.318.*lower --lr"),
        ([8.5, 8.31, 8.32, 8.318], [9.1, 8.316, 8.318], r"stuck at 8\.318, about ln\(4,096\)"),
        ([8.31, 8.32, 8.318], [], r"stuck at 8\.318, about ln\(4,096\)"),
        ([5.01, 4.99, 5.0], [], r"did not move in 30 steps: 5\.010 at first, 5\.000 at last.*another|higher --lr"),
        ([3.0, 2.0, 3.0], [5.0, 4.999, 5.001], r"did not move in 30 steps: 5\.000 at first, 5\.001 at last"),
    ],
)
def test_loss_that_does_not_move_is_noted(
    losses: list[float], evaluations: list[float], note: str, tmp_path: Path
) -> None:
    verdict = judge(RunRecord.read(write_run(tmp_path / "run", losses, evaluations, facts=facts_of(200))))
    assert re.search(note, verdict.notes[-1])
    assert not verdict.better


def test_loss_of_preferences_has_no_uniform_guess(tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "run", [0.69, 0.69], [0.693, 0.65, 0.6], settings={"verb": "dpo"}, facts=facts_of(200, vocabulary=2)
    )
    assert judge(RunRecord.read(run)).better

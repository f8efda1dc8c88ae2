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
        ("at the end", "1.000", "step 20"),
        ("perplexity", "2.72", "54.6 before"),
    ]
    assert not verdict.notes


def test_worse(tmp_path: Path) -> None:
    verdict = judged(tmp_path, [1.0], [1.0, 1.5, 1.2])
    assert verdict.better is False
    assert verdict.sentence == "It got worse: held-out loss 1.000 → 1.200 nats a token."


def test_rising_again_is_said(tmp_path: Path) -> None:
    verdict = judged(tmp_path, [1.0], [2.0, 1.0, 1.5])
    (note,) = verdict.notes
    assert note.startswith("After step 10 of 20 the held-out loss rose again, from 1.000 to 1.500: the run overfits")
    assert "--keep best" in note
    assert ("lowest", "1.000", "step 10") in verdict.figures


def test_a_rise_on_a_few_rows_is_no_alarm(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [1.0], [2.0, 1.0, 1.5], facts=facts_of(2))
    assert not any("rose" in note for note in judge(RunRecord.read(run)).notes)


def test_a_last_evaluation_hardly_above_the_best_is_no_rise(tmp_path: Path) -> None:
    assert not judged(tmp_path, [1.0], [2.0, 1.0, 1.01]).notes


def test_accuracy_of_labeled_answers_is_shown_without_chance(tmp_path: Path) -> None:
    columns = {"eval_accuracy": [0.5, 0.78], "eval_margin": [0.1, 0.4]}
    run = write_run(tmp_path / "run", [0.6], [0.5, 0.4], settings={"verb": "kto"}, columns=columns)
    verdict = judge(RunRecord.read(run))
    assert verdict.sentence.endswith("; 78 % of the answers classified correctly.")
    assert ("answers classified correctly", "78 %", "50 % before") in verdict.figures


def test_source_that_got_worse_is_named(tmp_path: Path) -> None:
    columns = {"eval_loss/a.jsonl": [5.0, 1.0, 1.5], "eval_loss/b.jsonl": [2.0, 1.0, 2.5]}
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
    assert verdict.figures[2:] == [
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


@pytest.mark.parametrize(
    ("rows", "words"), [(1, "1 held-out row is"), (2, "2 held-out rows are"), (5, "5 held-out rows are")]
)
def test_few_held_out_rows_give_no_verdict(rows: int, words: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [2.0, 1.0], [4.0, 2.0, 1.0], facts=facts_of(rows))
    verdict = judge(RunRecord.read(run))
    assert verdict.better is None
    assert verdict.sentence.startswith(f"{words} too few to say whether it got better: held-out loss 4.000 → 1.000")
    assert "--eval-split" in verdict.notes[0]


def test_a_change_that_may_be_chance_is_no_verdict(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [2.0, 1.0], [2.0, 1.9], facts=facts_of(40))
    parts = [{"step": 0, "sums": [2.0] * 40}, {"step": 10, "sums": [1.0] * 21 + [2.895] * 19}]
    lines = [json.dumps(part | {"counts": [1] * 40}) + "\n" for part in parts]
    (run / "held_out.jsonl").write_text("".join(lines))
    verdict = judge(RunRecord.read(run))
    assert verdict.better is None
    assert verdict.sentence.startswith("40 held-out rows are too few to say whether it got better")
    assert str(verdict.tested) == "too few to say (n = 40)"


@pytest.mark.parametrize(
    "parts",
    ["", '{"step": 0}\n', '{"step": 0, "sums": ["x"], "counts": [1]}\n', '{"step": 0, "sums": [1], "counts": [1]}\n'],
)
def test_without_the_parts_of_the_loss_nothing_is_claimed(parts: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [2.0, 1.0], [4.0, 2.0, 1.0])
    (run / "held_out.jsonl").write_text(parts)
    verdict = judge(RunRecord.read(run))
    assert (verdict.better, verdict.tested) == (None, None)
    assert verdict.sentence.startswith("Whether it got better was not tested: held-out loss 4.000 → 1.000")


def test_the_kept_weights_are_judged(tmp_path: Path) -> None:
    facts = facts_of(200) | {"kept": {"step": 10, "why": "best"}}
    verdict = judge(RunRecord.read(write_run(tmp_path / "run", [1.0], [2.0, 1.0, 1.5], facts=facts)))
    assert "held-out loss 2.000 → 1.000" in verdict.sentence


@pytest.mark.parametrize(
    ("evaluations", "falling"),
    [([4.0, 3.5, 3.0, 2.5, 2.0, 1.5], True), ([4.0, 2.0, 1.2, 1.05, 1.01, 1.0], False), ([2.0] * 5 + [2.1], False)],
)
def test_a_run_that_ends_while_its_loss_falls_was_too_short(
    evaluations: list[float], falling: bool, tmp_path: Path
) -> None:
    columns = {"learning_rate": [1e-3] * 5}
    facts, settings = facts_of(40), {"epochs": 1.5}
    run = write_run(tmp_path / "run", evaluations[1:], evaluations, facts=facts, settings=settings, columns=columns)
    notes = [note for note in judge(RunRecord.read(run)).notes if "still falling" in note]
    assert len(notes) == falling
    assert all("held-out loss was still falling" in note and "--epochs 3." in note for note in notes)


def test_flat_ends_of_schedules_are_no_sign_of_an_end(tmp_path: Path) -> None:
    """The loss fell evenly with the learning rates that the run has used, which were small at its end."""
    rates = [1e-3, 8e-4, 5e-4, 2e-4, 1e-5]
    losses = [4.0 - sum(rates[: i + 1]) * 1000 for i in range(5)]
    columns = {"learning_rate": rates}
    run = write_run(tmp_path / "run", losses, [], settings={"steps": 50}, columns=columns)
    notes = judge(RunRecord.read(run)).notes
    assert any("training loss was still falling" in note and "--steps 100." in note for note in notes)


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

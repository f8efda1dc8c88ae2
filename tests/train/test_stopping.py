"""When a run ends, and with which weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hymba_tune.config import SFTConfig
from hymba_tune.errors import ConfigError
from hymba_tune.train.resuming import resume_config
from hymba_tune.train.run import Run
from hymba_tune.train.screen import Screen
from hymba_tune.train.stopping import since_best
from hymba_tune.train.trainer import HymbaTrainer
from tests.runs import run, same_tensors, save_questions, settings, tensors

LOSSES = {1: 5.0, 2: 4.0, 3: 4.5, 4: 4.0, 5: 4.2, 6: 3.0}


class Notes(Screen):
    """Records the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def fixed_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the evaluations' losses by `LOSSES`."""
    evaluate = HymbaTrainer.evaluation_loop

    def evaluation_loop(self: HymbaTrainer, *args: Any, **kwargs: Any) -> Any:
        output = evaluate(self, *args, **kwargs)
        output.metrics["eval_loss"] = LOSSES.get(self.state.global_step, 9.0)
        return output

    monkeypatch.setattr(HymbaTrainer, "evaluation_loop", evaluation_loop)


def changed(**changes: Any) -> dict[str, Any]:
    return {"steps": 6, "eval_every": 1, "save_every": 4} | changes


@pytest.mark.parametrize("method", [{}, {"method": "dora", "meta_tokens": "full"}, {"method": "full"}])
@pytest.mark.usefixtures("fixed_losses")
def test_stops_early_and_keeps_the_best(
    method: dict[str, Any], small_model: Path, questions: Path, tmp_path: Path
) -> None:
    notes = Notes()
    finished = run(settings(small_model, questions, tmp_path / "out", **changed(early_stopping=3), **method), notes)
    assert finished.facts()["steps"] == 5
    ended = "no better evaluation in 3"
    assert finished.facts()["kept"] == {"step": 2, "eval_loss": 4.0, "why": "best", "ended": ended}
    assert notes.notes == [f"stopped early: {ended} · kept the best weights (step 2, held-out loss 4.000)"]
    result = finished.model if finished.model.is_dir() else finished.adapter
    assert same_tensors(result, finished.checkpoints / "checkpoint-2")
    assert not same_tensors(result, finished.checkpoints / "checkpoint-5")


@pytest.mark.usefixtures("fixed_losses")
def test_keep_last_ends_with_the_last_weights(small_model: Path, questions: Path, tmp_path: Path) -> None:
    finished = run(settings(small_model, questions, tmp_path / "out", **changed(early_stopping=3, keep="last")))
    kept = finished.facts()["kept"]
    assert (kept["step"], kept["why"]) == (5, "last")
    assert same_tensors(finished.adapter, finished.checkpoints / "checkpoint-5")


@pytest.mark.usefixtures("fixed_losses")
def test_keep_best_without_early_stopping_goes_to_the_end(small_model: Path, questions: Path, tmp_path: Path) -> None:
    finished = run(settings(small_model, questions, tmp_path / "out", **changed(keep="best", eval_every=4)))
    # The last step is evaluated as well, and is the best.
    assert [row.step for row in finished.evaluations()] == [0, 4, 6]
    assert finished.facts()["kept"] == {"step": 6, "eval_loss": 3.0, "why": "best", "ended": None}


@pytest.mark.usefixtures("fixed_losses")
def test_resumed_run_ends_as_it_would_have(small_model: Path, questions: Path, tmp_path: Path) -> None:
    """Also where it has been moved, and where its last checkpoint is already the end."""
    out = tmp_path / "out"
    sources = [str(questions), str(save_questions(tmp_path / "few.jsonl", 3))]
    whole = run(settings(small_model, questions, out, **changed(early_stopping=3), eval_data=sources))
    before, losses = tensors(whole.adapter), [row.source_losses for row in whole.evaluations()]
    assert all(row.keys() == {"questions.jsonl", "few.jsonl"} for row in losses)
    for step in (4, 5):
        moved = Path(out.rename(tmp_path / f"moved-{step}"))
        for checkpoint in Run(moved).checkpoints.iterdir():
            if int(checkpoint.name.split("-")[1]) > step:
                (checkpoint / "whole").unlink()
        finished = run(resume_config(SFTConfig(resume=moved)))
        assert finished.facts()["steps"] == 5
        assert finished.facts()["kept"]["step"] == 2
        after = tensors(finished.adapter)
        assert all(after[name].equal(before[name]) for name in before)
        assert [row.source_losses for row in finished.evaluations()] == losses
        out = moved


@pytest.mark.usefixtures("fixed_losses")
def test_best_weights_that_are_torn_are_not_kept(small_model: Path, questions: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(settings(small_model, questions, out, **changed(keep="best", steps=5)))
    (out / "checkpoints/checkpoint-2/adapter_model.safetensors").write_bytes(b"torn")
    finished = run(resume_config(SFTConfig(resume=out)))
    assert finished.facts()["kept"]["why"] == "last"


@pytest.mark.parametrize(
    ("changes", "flag"), [({"early_stopping": 2}, "early-stopping"), ({"keep": "best"}, "keep best")]
)
def test_going_by_held_out_data_needs_some(
    changes: dict[str, Any], flag: str, small_model: Path, questions: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=f"--{flag} needs the held-out loss, and no data is held out"):
        run(settings(small_model, questions, tmp_path / "out", eval_split=0, **changes))
    assert not (tmp_path / "out").exists()


def test_patience_counts_from_the_first_lowest() -> None:
    assert since_best([]) == 0
    assert since_best([3.0]) == 0
    assert since_best([3.0, 2.0]) == 0
    assert since_best([3.0, 2.0, 2.0, 2.5]) == 2

"""A run stops before a step that would break its weights, and names the rows of that step."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import TrainerControl, TrainerState, TrainingArguments

from hymba_tune.checkpoint import load_tokenizer
from hymba_tune.config import SFTConfig
from hymba_tune.errors import TrainingError
from hymba_tune.train.guard import FEWEST_STEPS, LossGuard, listed
from hymba_tune.train.preference_trainers import PairTrainer, UnpairedTrainer
from hymba_tune.train.resuming import resume_config
from hymba_tune.train.run import Run
from hymba_tune.train.trainer import HymbaTrainer
from tests.preferences import dpo, kto, save_labeled, save_pairs
from tests.runs import run, same_tensors, save_questions, settings

BAD_LINE = 25


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Questions, and one that reads like none of them."""
    path = save_questions(tmp_path / "questions.jsonl")
    with path.open("a") as file:
        file.write(json.dumps({"prompt": "Is it bad?", "completion": "Yes, it is the only bad one of them."}) + "\n")
    return path


def break_losses(monkeypatch: pytest.MonkeyPatch, of: Callable[[HymbaTrainer, dict[str, Any]], float | None]) -> None:
    """Multiply the loss of some batches."""
    loss_of = HymbaTrainer.compute_loss

    def compute_loss(self: HymbaTrainer, model: Any, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        loss = loss_of(self, model, inputs, *args, **kwargs)
        factor = of(self, inputs)
        return loss if factor is None or not torch.is_grad_enabled() else loss * factor

    monkeypatch.setattr(HymbaTrainer, "compute_loss", compute_loss)


@pytest.mark.parametrize(("factor", "changes"), [(float("nan"), {}), (float("inf"), {"grad_accum": 3})])
def test_loss_that_is_not_finite_stops_before_the_step(
    factor: float,
    changes: dict[str, Any],
    small_model: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken: list[list[list[int]]] = []

    def of(self: HymbaTrainer, inputs: dict[str, Tensor]) -> float | None:
        if self.state.global_step < 3:
            return None
        if self.step_batches:
            return None  # the first batch of a step only
        broken.append(inputs["input_ids"].tolist())
        return factor

    break_losses(monkeypatch, of)
    config = settings(small_model, data, tmp_path / "out", steps=8, save_every=1, eval_split=0, batch_size=2, **changes)
    with pytest.raises(TrainingError, match=r"The loss is (nan|inf) at step 4\. Its rows: ") as error:
        run(config)
    message = str(error.value)
    assert re.search(r"questions\.jsonl, line \d+, \d+\.\n", message)
    checkpoint = tmp_path / "out/checkpoints/checkpoint-3"
    assert f"--model {checkpoint} starts from the last good weights with --lr 0.005" in message
    assert Run(tmp_path / "out").newest_checkpoint() == checkpoint
    # The command in the message works.
    monkeypatch.undo()
    finished = run(settings(checkpoint, data, tmp_path / "anew", eval_split=0, lr=0.005))
    assert finished.adapter.is_dir()


@pytest.mark.parametrize("packing", [False, True])
def test_rows_named_are_those_of_the_batch(
    packing: bool, small_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = load_tokenizer(small_model)(" the only bad one", add_special_tokens=False).input_ids[1:]

    def of(_: HymbaTrainer, inputs: dict[str, Tensor]) -> float | None:
        text = " ".join(map(str, inputs["input_ids"].flatten().tolist()))
        return float("nan") if " ".join(map(str, bad)) in text else None

    break_losses(monkeypatch, of)
    changes = {"packing": packing, "max_length": 200, "batch_size": 1, "eval_split": 0, "steps": 40}
    with pytest.raises(TrainingError, match=rf"The loss is nan .*questions\.jsonl, line .*\b{BAD_LINE}\b") as error:
        run(settings(small_model, data, tmp_path / "out", **changes))
    lines = str(error.value).split("questions.jsonl, line ")[1].split(".\n")[0].split(", ")
    assert (len(lines) > 1) is packing
    assert not (tmp_path / "out").exists()  # nothing had been saved
    assert "start again with --lr 0.005" in str(error.value)


def test_infinite_gradient_stops(
    small_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norm_of = HymbaTrainer._clip_grad_norm

    def clip(self: HymbaTrainer, model: torch.nn.Module) -> Any:
        if self.state.global_step == 2:
            next(p for p in model.parameters() if p.grad is not None).grad[0] = float("inf")
        return norm_of(self, model)

    monkeypatch.setattr(HymbaTrainer, "_clip_grad_norm", clip)
    with pytest.raises(TrainingError, match=r"The gradient's norm is inf at step 3, at a loss of \d+\.\d+\. Its rows"):
        run(settings(small_model, data, tmp_path / "out", steps=4, save_every=1))
    assert Run(tmp_path / "out").last_checkpoint().name == "checkpoint-2"


def test_jump_of_the_loss_stops_and_can_be_allowed(
    small_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    high = FEWEST_STEPS + 2
    break_losses(monkeypatch, lambda self, _: 100.0 if self.state.global_step == high - 1 else None)
    changes = {"steps": high + 1, "save_every": 5, "eval_split": 0}
    with pytest.raises(
        TrainingError, match=rf"The loss jumped to \d+\.\d+ at step {high}, from .* \(the median of {high - 1} steps\)"
    ) as error:
        run(settings(small_model, data, tmp_path / "out", **changes))
    assert re.search(r"expected   at most [\d.]+ \(--max-loss-spike 5\)", str(error.value))
    assert f"--resume {tmp_path / 'out'} --max-loss-spike 10" in str(error.value)
    # The losses before the checkpoint count after it as well: it stops again, unless a larger jump is allowed.
    with pytest.raises(TrainingError, match=rf"jumped .* at step {high}, from .* \(the median of {high - 1} steps\)"):
        run(resume_config(SFTConfig(resume=tmp_path / "out")))
    finished = run(resume_config(SFTConfig(resume=tmp_path / "out", max_loss_spike=1e6)))
    monkeypatch.undo()
    assert finished.facts()["steps"] == high + 1


def test_evaluation_that_is_not_finite_stops_before_its_weights_are_saved(
    small_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = HymbaTrainer.evaluation_loop

    def evaluation_loop(self: HymbaTrainer, *args: Any, **kwargs: Any) -> Any:
        output = evaluate(self, *args, **kwargs)
        if self.state.global_step == 2:
            output.metrics["eval_loss"] = float("nan")
        return output

    monkeypatch.setattr(HymbaTrainer, "evaluation_loop", evaluation_loop)
    with pytest.raises(TrainingError, match=r"The loss on the held-out data is nan at step 2\."):
        run(settings(small_model, data, tmp_path / "out", steps=3, eval_every=1))
    assert Run(tmp_path / "out").last_checkpoint().name == "checkpoint-1"


def test_places_are_grouped_by_file() -> None:
    places = ["a.jsonl, line 3", "b c.csv, row 1", "a.jsonl, line 18"]
    assert listed(places) == "a.jsonl, line 3, 18; b c.csv, row 1"


def test_guard_changes_no_number(small_model: Path, data: Path, tmp_path: Path) -> None:
    one, other = (
        run(settings(small_model, data, tmp_path / str(spike), max_loss_spike=spike)) for spike in (None, 2.0)
    )
    assert same_tensors(one.adapter, other.adapter)


@pytest.mark.parametrize("verb", ["dpo", "kto"])
def test_preference_trainers_are_guarded_too(
    verb: str, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their batches hold each prompt with its answers: the named rows are those of the batch."""
    trainer, train, save = (PairTrainer, dpo, save_pairs) if verb == "dpo" else (UnpairedTrainer, kto, save_labeled)
    data = save(tmp_path / "rows.jsonl")
    loss_of = trainer.compute_loss

    def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = loss_of(self, *args, **kwargs)
        return loss * float("nan") if self.state.global_step == 1 and torch.is_grad_enabled() else loss

    monkeypatch.setattr(trainer, "compute_loss", compute_loss)
    with pytest.raises(TrainingError, match=r"The loss is nan at step 2\. Its rows: .*rows\.jsonl, line \d+") as error:
        train(finished_run, data, tmp_path / "out", steps=3, save_every=1, batch_size=2, eval_split=0)
    lines = re.search(r"rows\.jsonl, line ([\d, ]+)\.", str(error.value))
    assert lines
    assert 1 <= len(lines[1].split(", ")) <= 2
    assert Run(tmp_path / "out").last_checkpoint().name == "checkpoint-1"


class Steps:
    """A trainer of whose steps only the losses are known."""

    stop_requested = stop_agreed = False

    def __init__(self) -> None:
        self.step_batches: list[tuple[dict[str, Any], Tensor]] = []

    def step_numbers(self) -> tuple[list[float], float]:
        return [loss.item() for _, loss in self.step_batches], 1.0


def spikes(losses: list[float], tmp_path: Path, *, vocabulary: int | None, max_spike: float | None = 5.0) -> int | None:
    """The first step that the guard stops at."""
    trainer, state = Steps(), TrainerState()
    guard = LossGuard(trainer, Run(tmp_path), max_spike=max_spike, vocabulary=vocabulary, places=lambda _: [])
    arguments, control = TrainingArguments(str(tmp_path), use_cpu=True), TrainerControl()
    for step, loss in enumerate(losses):
        state.global_step = step
        trainer.step_batches = [({}, torch.tensor(loss))]
        try:
            guard.on_pre_optimizer_step(arguments, state, control)
        except TrainingError:
            return step
    return None


@pytest.mark.parametrize("vocabulary", [61, 4096, 32001])
@pytest.mark.parametrize("usual", [0.05, 0.2, 0.5])
def test_model_that_forgets_everything_is_a_spike_in_any_vocabulary(
    vocabulary: int, usual: float, tmp_path: Path
) -> None:
    uniform = math.log(vocabulary)
    losses = [usual * uniform] * FEWEST_STEPS
    assert spikes([*losses, uniform], tmp_path, vocabulary=vocabulary) == FEWEST_STEPS
    # A higher limit, which the message names, allows it; and preference losses have no uniform guess.
    assert spikes([*losses, uniform], tmp_path, vocabulary=vocabulary, max_spike=200) is None
    assert spikes([*losses, uniform], tmp_path, vocabulary=vocabulary, max_spike=None) is None


@given(
    vocabulary=st.integers(32, 200_000),
    shares=st.lists(st.floats(0.85, 1.2), min_size=12, max_size=20),
    usual=st.floats(0.01, 0.99),
)
@hypothesis.settings(
    max_examples=25, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_ordinary_batches_are_no_spikes(vocabulary: int, shares: list[float], usual: float, tmp_path: Path) -> None:
    """Whatever share of a uniform guess's the usual loss is."""
    losses = [usual * math.log(vocabulary) * share for share in shares]
    assert spikes(losses, tmp_path, vocabulary=vocabulary) is None

"""What the trainer computes, against plain loops over rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel

from hymba_tune.adapters import add_adapter
from hymba_tune.checkpoint import load_tokenizer, load_weights
from hymba_tune.data import build_dataset, open_sources
from hymba_tune.registry import resolve_model
from hymba_tune.train.trainer import HymbaTrainer
from tests.adapters.small import config_for
from tests.runs import one_plain_step
from tests.tolerances import FLOAT32, FLOAT32_GRADIENT


@pytest.fixture(scope="module")
def data(small_model: Path, questions: Path) -> Dataset:
    """Eight rows of different lengths."""
    rows, _ = build_dataset(open_sources([str(questions)]), load_tokenizer(small_model), max_length=64)
    return rows.select(range(8))


@pytest.fixture
def trainer(small_model: Path, data: Dataset, tmp_path: Path) -> Callable[..., HymbaTrainer]:
    def make(
        *, rows: Dataset = data, batch_size: int = 8, grad_accum: int = 1, adapted: bool = False, **changes: Any
    ) -> HymbaTrainer:
        model = load_weights(resolve_model(str(small_model)), dtype=torch.float32, device=torch.device("cpu"))
        if adapted:
            model = add_adapter(model, config_for(model), ["all"])
        skipped = {"skip_prepare_dataset": not changes.get("packing")}
        args = one_plain_step(tmp_path, batch_size=batch_size, grad_accum=grad_accum, dataset_kwargs=skipped, **changes)
        return HymbaTrainer(
            model=model,
            args=args,
            train_dataset=rows,
            eval_dataset=rows,
            processing_class=load_tokenizer(small_model),
        )

    return make


@pytest.fixture(scope="module")
def weighted(data: Dataset) -> Dataset:
    """The same rows, two of three with weights for each token."""
    weights = [
        None if number % 3 == 0 else [(number + place % 5) / 12 for place in range(len(row["labels"]))]
        for number, row in enumerate(data)
    ]
    return data.add_column("loss_weights", weights)


def loop(model: torch.nn.Module, rows: Dataset) -> tuple[torch.Tensor, float]:
    """Summed loss of the rows, each passed alone, and how many tokens that are; or both by their weights."""
    total, count = torch.zeros(()), 0.0
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        weights = torch.tensor(row.get("loss_weights") or [1.0] * len(labels))[1:] * (labels[1:] != -100)
        logits = model(input_ids=ids).logits[0]
        losses = torch.nn.functional.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="none")
        total = total + losses @ weights
        count += float(weights.sum())
    return total, count


LAYOUTS: dict[str, dict[str, Any]] = {
    "one_batch": {},
    "rows_alone": {"batch_size": 1, "grad_accum": 8},
    "accumulated": {"batch_size": 2, "grad_accum": 4},
    "packed": {"packing": True},
    "packed_in_two": {"packing": True, "batch_size": 2, "grad_accum": 4},
}


@pytest.mark.parametrize("kind", ["data", "weighted"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_first_step_is_that_of_a_plain_loop(
    layout: str, kind: str, trainer: Callable[..., HymbaTrainer], request: pytest.FixtureRequest
) -> None:
    """The loss is a token's, however rows are batched, padded, packed and accumulated; SGD's step is the gradient."""
    rows: Dataset = request.getfixturevalue(kind)
    fit = trainer(rows=rows, **LAYOUTS[layout])
    before = {name: parameter.detach().clone() for name, parameter in fit.model.named_parameters()}
    total, count = loop(fit.model, rows)
    (total / count).backward()
    gradients = {name: parameter.grad for name, parameter in fit.model.named_parameters() if parameter.grad is not None}
    fit.model.zero_grad()
    fit.train()
    first = next(row for row in fit.state.log_history if "loss" in row)
    FLOAT32.check(torch.tensor(first["loss"]), (total / count).detach(), "loss")
    after = dict(fit.model.named_parameters())
    FLOAT32_GRADIENT.check_all({name: before[name] - after[name].detach() for name in gradients}, gradients)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("packing", [False, True])
def test_evaluation_is_the_mean_over_learned_tokens(
    packing: bool, batch_size: int, trainer: Callable[..., HymbaTrainer], data: Dataset
) -> None:
    fit = trainer(packing=packing, batch_size=batch_size)
    with torch.no_grad():
        total, count = loop(fit.model, data)
    metrics = fit.evaluate()
    FLOAT32.check(torch.tensor(metrics["eval_loss"]), total / count)
    assert not [name for name in metrics if name.startswith("eval_loss/")]


@pytest.mark.parametrize("packing", [False, True])
def test_evaluation_of_several_sources_is_the_mean_over_the_tokens_of_each_and_of_all(
    packing: bool, trainer: Callable[..., HymbaTrainer], weighted: Dataset
) -> None:
    fit = trainer(rows=weighted, packing=packing, batch_size=3)
    fit.held_out_sources = {"a": 1, "b": 5, "c": 2}
    with torch.no_grad():
        parts = {"a": loop(fit.model, weighted.select([0])), "b": loop(fit.model, weighted.select(range(1, 6)))}
        parts["c"] = loop(fit.model, weighted.select([6, 7]))
    metrics = fit.evaluate()
    for name, (total, count) in parts.items():
        FLOAT32.check(torch.tensor(metrics[f"eval_loss/{name}"]), total / count)
    tokens = sum(count for _, count in parts.values())
    mean = sum(metrics[f"eval_loss/{name}"] * count for name, (_, count) in parts.items()) / tokens
    assert metrics["eval_loss"] == pytest.approx(mean, rel=1e-6)


def test_first_tokens_are_no_targets_even_where_they_are_labelled(
    trainer: Callable[..., HymbaTrainer], data: Dataset
) -> None:
    whole = data.map(lambda row: {"labels": row["input_ids"]})
    for packing in (False, True):
        fit = trainer(rows=whole, packing=packing, batch_size=3)
        with torch.no_grad():
            total, count = loop(fit.model, whole)
        assert count == sum(len(row["input_ids"]) - 1 for row in whole)
        FLOAT32.check(torch.tensor(fit.evaluate()["eval_loss"]), total / count)


@pytest.mark.parametrize("adapted", [False, True])
def test_model_keeps_its_own_forward(adapted: bool, trainer: Callable[..., HymbaTrainer]) -> None:
    """TRL sets a forward on the instance, which would still compute with these weights in a copy of the model."""
    model = trainer(adapted=adapted).model
    assert isinstance(model, PeftModel) is adapted
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]


def test_weight_decay_leaves_rates_and_skips_alone(trainer: Callable[..., HymbaTrainer]) -> None:
    fit = trainer(weight_decay=0.1)
    decayed = fit.get_decay_parameter_names(fit.model)
    everything = dict(fit.model.named_parameters())
    left = {name.split("mamba.")[-1].split("layers.")[-1] for name in everything if name not in decayed}
    assert {"A_log.0", "D.0", "dt_proj.0.bias"} <= left
    assert all(parameter.ndim >= 2 for name, parameter in everything.items() if name in decayed)
    assert all("norm" not in name for name in decayed)
    assert {name for name in everything if name.endswith(("proj.weight", "tokens.weight"))} <= set(decayed)


def test_weight_decay_takes_its_share_of_the_weights_only(trainer: Callable[..., HymbaTrainer]) -> None:
    plain, decaying = trainer(), trainer(weight_decay=0.1)
    before = {name: parameter.detach().clone() for name, parameter in plain.model.named_parameters()}
    plain.train()
    decaying.train()
    plain_after, decayed_after = dict(plain.model.named_parameters()), dict(decaying.model.named_parameters())
    for name in ("model.layers.1.mamba.A_log.0", "model.layers.1.mamba.D.0"):
        assert torch.equal(plain_after[name], decayed_after[name])
    name = "model.layers.1.mamba.in_proj.weight"
    FLOAT32_GRADIENT.check(plain_after[name] - decayed_after[name], 0.1 * before[name])


def test_checkpoint_is_marked_whole_last(trainer: Callable[..., HymbaTrainer], tmp_path: Path) -> None:
    fit = trainer()
    fit.args.save_strategy, fit.args.save_steps = "steps", 1
    fit.train()
    folder = tmp_path / "checkpoint-1"
    newest = max(path.stat().st_mtime_ns for path in folder.iterdir())
    assert (folder / "whole").stat().st_mtime_ns == newest
    assert not (folder / "README.md").exists()

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hymba_tune.adapters import Update, adapter_updates, full_updates
from tests.adapters.small import METHODS, adapted_model, merged, train
from tests.tiny import tiny_model


def relative_change(before: dict[str, Tensor], after: dict[str, Tensor], name: str, rows: slice = slice(None)) -> float:
    old, new = before[name][rows].double(), after[name][rows].double()
    return float((new - old).norm() / old.norm())


def sizes(updates: list[Update]) -> dict[tuple[str, int | None], float]:
    assert all(update.size is not None for update in updates)
    return {(update.part, update.layer): update.size or 0.0 for update in updates}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("meta", ["lora", "full"])
def test_updates_are_those_of_the_merged_weights(method: str, meta: str, tmp_path: Path) -> None:
    model = adapted_model(meta=meta, **METHODS[method])
    before = copy.deepcopy(tiny_model().state_dict())
    train(model)
    measured = sizes(adapter_updates(model))
    after = merged(model, tmp_path).state_dict()
    widths = {layer: block.mamba.widths for layer, block in enumerate(tiny_model().model.layers)}
    for (part, layer), size in measured.items():
        if layer is None:
            assert size == pytest.approx(relative_change(before, after, "model.memory_tokens.weight"), rel=1e-4)
            continue
        prefix = f"model.layers.{layer}"
        if part in ("q", "k", "v", "x", "gate"):
            index = ["q", "k", "v", "x", "gate"].index(part)
            start = sum(widths[layer][:index])
            rows = slice(start, start + widths[layer][index])
            expected = relative_change(before, after, f"{prefix}.mamba.in_proj.weight", rows)
        else:
            ends = (f"{part}.weight", f"{part}.0.weight")
            (name,) = (name for name in after if name.startswith(prefix) and name.endswith(ends))
            expected = relative_change(before, after, name)
        assert size == pytest.approx(expected, rel=1e-4), (part, layer)
    # Layer 2 takes its keys and values from layer 1.
    assert ("k", 1) in measured
    assert ("k", 2) not in measured
    # There are eleven parts in each of four layers, without the keys and values of one layer, plus the meta tokens.
    assert len(measured) == 4 * 11 - 2 + 1


def test_rows_outside_of_a_preset_have_no_update() -> None:
    model = adapted_model("ssm")
    train(model)
    updates = adapter_updates(model)
    groups = {group: [u.size for u in updates if u.group == group] for group in {u.group for u in updates}}
    assert groups.keys() == {"attention", "SSM", "attention + SSM", "meta tokens"}
    assert set(groups["attention"]) == {0.0}
    assert all(size > 0 for size in groups["SSM"] if size is not None)


def test_full_training_is_measured_against_the_initial_weights(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    assert all(update.size == 0 for update in full_updates(model, tmp_path))
    before: dict[str, Any] = copy.deepcopy(model.state_dict())
    train(model)
    updates = full_updates(model, tmp_path)
    measured = sizes(updates)
    assert measured["down_proj", 3] == pytest.approx(
        relative_change(before, model.state_dict(), "model.layers.3.moe.experts.0.down_proj.weight"), rel=1e-4
    )
    assert {update.group for update in updates} == {
        *("attention", "SSM", "attention + SSM", "MLP", "meta tokens", "embedding")
    }
    assert measured["memory_tokens", None] > 0


def test_nan_update_has_no_size() -> None:
    model = adapted_model()
    train(model)
    with torch.no_grad():
        model.get_base_model().model.layers[0].mamba.out_proj.lora_B["default"].weight.fill_(float("nan"))
    without_size = [update for update in adapter_updates(model) if update.size is None]
    assert [(update.part, update.layer) for update in without_size] == [("out_proj", 0)]

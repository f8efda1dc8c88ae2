from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hymba_tune.checkpoint import load_weights
from hymba_tune.config import Scheme
from hymba_tune.quant import QuantizationDrift, quantize_model, quantized_only, search
from hymba_tune.registry import ModelSource
from hymba_tune.schemes import quantization

KINDS = ("in_proj", "out_proj", "gate_proj", "up_proj")
Measure = Callable[[frozenset[str]], QuantizationDrift]


def measuring(rises: dict[str, float], together: float = 0.0) -> Measure:
    """Losses that rise by so much a kind, and by something more where several are quantized."""

    def measure(kinds: frozenset[str]) -> QuantizationDrift:
        rise = sum(rises[kind] for kind in kinds) + together * (len(kinds) - 1)
        return QuantizationDrift(kl=abs(rise), loss_before=2.0, loss_after=2.0 + rise, same=0.9)

    return measure


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(-10, 100), min_size=4, max_size=4),
    st.permutations([2, 3, 5, 8]),
    st.integers(0, 200),
)
def test_what_is_left_gives_up_least_among_all_sets_that_hold(
    thousandths: list[int], saved: list[int], most: int
) -> None:
    rises, max_rise = [each / 1000 for each in thousandths], math.expm1((most + 0.5) / 1000)
    known, sizes = dict(zip(KINDS, rises, strict=True)), dict(zip(KINDS, saved, strict=True))
    found = search(sizes, measuring(known), max_rise)
    holding = [
        left
        for size in range(4)
        for left in combinations(KINDS, size)
        if math.expm1(sum(known[kind] for kind in KINDS if kind not in left)) <= max_rise
    ]
    least = min((sum(sizes[kind] for kind in left) for left in holding), default=None)
    assert (found.skip is None) == (least is None)
    if found.skip is not None:
        assert sum(sizes[kind] for kind in found.skip) == least
        assert found.whole[-1].drift.rise <= max_rise
        assert found.left_of(found.whole[-1]) == found.skip
    alone = [trial.drift.loss_rise for trial in found.alone]
    assert alone == pytest.approx(sorted(rises, reverse=True))


def test_set_is_rejected_if_its_trial_exceeds_the_limit() -> None:
    """Two kinds, each harmless alone, that do harm together."""
    known = dict.fromkeys(KINDS, 0.001)
    known["in_proj"] = 0.05
    found = search(dict(zip(KINDS, (2, 3, 5, 8), strict=True)), measuring(known, together=0.004), max_rise=0.0065)
    tried = [found.left_of(trial) for trial in found.whole]
    assert tried == [(), ("in_proj",), ("in_proj", "out_proj")]  # and not one that leaves in_proj to be quantized
    assert found.skip == ("in_proj", "out_proj")
    assert found.whole[-1].drift.rise <= 0.0065


@pytest.mark.parametrize("scheme", Scheme)
def test_modules_that_changed_places_are_those_of_a_model_quantized_so(scheme: Scheme, wide_model: Path) -> None:
    source = ModelSource("model", wide_model)
    model = load_weights(source, dtype=torch.float32, device=torch.device("cpu")).eval()
    made = quantize_model(model, quantization(model.config, scheme, torch.float32)).eval()
    left = ["in_proj", "up_proj"]
    meant = quantize_model(model, quantization(model.config, scheme, torch.float32, left)).eval()
    ids = torch.arange(3, 40)[None]
    before = model(ids).logits
    with quantized_only(model, made, frozenset({"out_proj", "gate_proj", "down_proj"})) as mixed:
        assert torch.equal(mixed(ids).logits, meant(ids).logits)
        assert not torch.equal(mixed(ids).logits, before)
    assert torch.equal(model(ids).logits, before)
    with pytest.raises(KeyboardInterrupt), quantized_only(model, made, frozenset({"in_proj"})):
        raise KeyboardInterrupt
    assert torch.equal(model(ids).logits, before)

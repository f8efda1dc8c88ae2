"""A search for the kinds of modules to leave unquantized: each kind is measured alone, and the proposal as a whole.

The sensitivity of a kind is the rise of the perplexity when only that kind is quantized, so that no other kind's error
hides its own. (With all kinds but one quantized, the errors of the others would.) To first order these rises add up, as
cross-entropies. Their sums therefore select the sets to try, and only a trial of the whole set decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations

from torch import nn
from transformers import PreTrainedModel

from hymba_tune.adapters.presets import kind_of
from hymba_tune.quant.damage import QuantizationDrift


@dataclass(frozen=True)
class Trial:
    """A measurement with some kinds of modules quantized.

    Attributes:
        kinds: The kinds that are quantized.
        drift: The measured drift of the predictions.
        saved: The bytes that this saves.
    """

    kinds: frozenset[str]
    drift: QuantizationDrift
    saved: int


@dataclass(frozen=True)
class Search:
    """The trials of a search, and its proposal.

    Attributes:
        alone: The trials of each kind alone, the most sensitive first.
        whole: The trials of sets of kinds in their order, all kinds first.
        max_rise: The maximum relative rise of the perplexity.
        skip: The kinds to leave unquantized; None if every set exceeds the maximum.
    """

    alone: list[Trial]
    whole: list[Trial]
    max_rise: float
    skip: tuple[str, ...] | None

    def left_of(self, trial: Trial) -> tuple[str, ...]:
        """Return the kinds that a trial leaves unquantized."""
        return tuple(sorted(self.whole[0].kinds - trial.kinds))


def search(saved: Mapping[str, int], measure: Callable[[frozenset[str]], QuantizationDrift], max_rise: float) -> Search:
    """Find the kinds to leave unquantized, so that the perplexity stays within a limit and most memory is saved.

    Args:
        saved: The bytes that quantizing each kind saves.
        measure: Measures the drift with exactly these kinds quantized.
        max_rise: The maximum relative rise of the perplexity.

    Returns:
        The trials, with the first set within the limit in the order of lost savings. Sets are not tried if the sum of
        their rises, scaled to the measured rise of all kinds together, exceeds the limit.
    """

    def attempt(kinds: frozenset[str]) -> Trial:
        return Trial(kinds, measure(kinds), sum(saved[kind] for kind in kinds))

    every = frozenset(saved)
    alone = sorted((attempt(frozenset({kind})) for kind in saved), key=lambda trial: -trial.drift.rise)
    whole = [attempt(every)]
    if whole[0].drift.rise <= max_rise:
        return Search(alone, whole, max_rise, ())
    rises = {kind: trial.drift.loss_rise for trial in alone for kind in trial.kinds}
    summed = sum(rises.values())
    scale = whole[0].drift.loss_rise / summed if summed > 0 else 1.0
    sets = [frozenset(left) for size in range(1, len(saved)) for left in combinations(saved, size)]
    for left in sorted(sets, key=lambda left: sum(saved[kind] for kind in left)):
        if scale * sum(rises[kind] for kind in every - left) > math.log1p(max_rise):
            continue
        if len(every - left) == 1:
            trial = next(trial for trial in alone if trial.kinds == every - left)
        else:
            trial = attempt(every - left)
        whole.append(trial)
        if trial.drift.rise <= max_rise:
            return Search(alone, whole, max_rise, tuple(sorted(left)))
    return Search(alone, whole, max_rise, None)


@contextmanager
def quantized_only(
    model: PreTrainedModel, quantized: PreTrainedModel, kinds: frozenset[str]
) -> Iterator[PreTrainedModel]:
    """Quantize only some kinds of a model's modules within the context, and restore the model afterwards.

    The quantized modules replace the original ones, so the computation is that of a model saved in this way.

    Args:
        model: The model, not quantized.
        quantized: The same model with all kinds quantized.
        kinds: The kinds of modules to take from ``quantized``.
    """
    plain = {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and kind_of(name) in kinds and type(quantized.get_submodule(name)) is not nn.Linear
    }
    try:
        for name in plain:
            model.set_submodule(name, quantized.get_submodule(name))
        yield model
    finally:
        for name, module in plain.items():
            model.set_submodule(name, module)

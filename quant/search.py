"""Which kinds of modules are worth leaving as they are: each measured alone, and what is proposed measured whole.

A kind's sensitivity is what the perplexity rises by when only that kind is quantized: beside weights that are as they
were, no other kind's error hides its own. (The other way round, all but one kind quantized, what one kind adds drowns
in what all the others do.) To first order these rises, as cross-entropies, add up; so their sums say which sets of
kinds are worth trying, and only a trial of the whole set says whether it holds.
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
    """What a model does with some kinds of modules quantized.

    Attributes:
        kinds: Those that are quantized.
        drift: Measured.
        saved: Bytes that this saves.
    """

    kinds: frozenset[str]
    drift: QuantizationDrift
    saved: int


@dataclass(frozen=True)
class Search:
    """What was tried, and what came of it.

    Attributes:
        alone: Each kind quantized alone, the most sensitive first.
        whole: Sets of them in the order they were tried, all kinds first.
        max_rise: By how much the perplexity may rise, as a share.
        skip: The kinds to leave as they are; None if even a single kind takes too much.
    """

    alone: list[Trial]
    whole: list[Trial]
    max_rise: float
    skip: tuple[str, ...] | None

    def left_of(self, trial: Trial) -> tuple[str, ...]:
        """The kinds that a trial leaves as they are."""
        return tuple(sorted(self.whole[0].kinds - trial.kinds))


def search(saved: Mapping[str, int], measure: Callable[[frozenset[str]], QuantizationDrift], max_rise: float) -> Search:
    """Find what to leave as it is, so that the perplexity stays within a limit and the least memory is given up.

    Args:
        saved: Bytes that quantizing each kind saves.
        measure: Lets the model predict with these kinds quantized, and no others.
        max_rise: By how much the perplexity may rise, as a share of what it was.

    Returns:
        The first set of kinds that holds, in the order of the memory they give up; sets that would not hold if rises
        added up, scaled to what all kinds together were measured to rise by, are not tried.
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
def quantized_only(model: PreTrainedModel, made: PreTrainedModel, kinds: frozenset[str]) -> Iterator[PreTrainedModel]:
    """A model with only some kinds of its modules quantized; afterwards it is as it was.

    The modules change places, so that nothing is computed otherwise than in a model that is written so.

    Args:
        model: Not quantized.
        made: All of it quantized.
        kinds: Of modules that `made` gives.
    """
    plain = {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and kind_of(name) in kinds and type(made.get_submodule(name)) is not nn.Linear
    }
    try:
        for name in plain:
            model.set_submodule(name, made.get_submodule(name))
        yield model
    finally:
        for name, module in plain.items():
            model.set_submodule(name, module)

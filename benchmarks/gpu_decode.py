"""Generation behind a full context: Hymba's throughput and cache against Llama-3.2-3B's, on the same card."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from gpu_measure import Bench, Failure, Measured, Row, free
from gpu_models import hymba, llama, random_ids
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from hymba_tune.model import HymbaCache
from hymba_tune.model.cache import CACHE_NAME

COLUMNS = ("model", "cache", "batch", "ms", "min", "max", "kernels ms", "tokens/s", "K+V MB", "state MB")
BATCHES = (128, 64, 32, 16, 8, 4, 2, 1)
"""The paper's, and what is tried where that does not fit."""
PAPER_SPEED, PAPER_CACHE = 3.49, 11.67
"""Hymba over Llama-3.2-3B: tokens a second at batch 128 on an A100, and smaller keys and values (arXiv 2411.13676)."""
STEPS = 8
"""Tokens generated between two looks at the clock."""


class RoomyLayer(DynamicLayer):
    """Keys and values written into memory that was taken once, as serving engines do.

    transformers' own layer copies all that it holds at every step, which would be most of Llama's time here.

    Args:
        filled: A layer that holds one text.
        batch: How often to hold that text.
        room: Tokens that may follow.
    """

    def __init__(self, filled: DynamicLayer, batch: int, room: int) -> None:
        super().__init__()
        self.lazy_initialization(filled.keys, filled.values)
        self.length = filled.get_seq_length()
        self.keys, self.values = (self._with_room(held, batch, room) for held in (filled.keys, filled.values))

    @staticmethod
    def _with_room(held: Tensor, batch: int, room: int) -> Tensor:
        _, heads, length, width = held.shape
        memory = held.new_empty(batch, heads, length + room, width)
        memory[:, :, :length] = held
        return memory

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write new keys and values ``(batch, heads, tokens, width)``; all that there are, as views."""
        new = slice(self.length, self.length + key_states.shape[-2])
        self.length = new.stop
        self.keys[:, :, new], self.values[:, :, new] = key_states, value_states
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self.length


class Generation:
    """Greedy decoding of a batch: each call adds `STEPS` tokens to every text.

    Args:
        model: To generate with.
        cache: Of ``batch`` texts.
        batch: How many.
    """

    def __init__(self, model: PreTrainedModel, cache: Cache, batch: int) -> None:
        self.model, self.cache = model, cache
        self.ids = random_ids(model, batch, 1)

    @torch.no_grad()
    def __call__(self) -> None:
        """Generate."""
        for _ in range(STEPS):
            logits = self.model(input_ids=self.ids, **{CACHE_NAME: self.cache}, use_cache=True, logits_to_keep=1).logits
            self.ids = logits[:, -1:].argmax(-1)


@torch.no_grad()
def filled(model: PreTrainedModel, cache: Cache, length: int) -> Cache:
    """The cache with one random text of this length."""
    model(input_ids=random_ids(model, 1, length), **{CACHE_NAME: cache}, use_cache=True, logits_to_keep=1)
    return cache


def hymba_cache(model: PreTrainedModel, length: int, batch: int) -> HymbaCache:
    """Hymba's cache of a batch of texts of this length."""
    cache = filled(model, HymbaCache(model.config), length)
    cache.batch_repeat_interleave(batch)
    return cache


def copying_cache(model: PreTrainedModel, length: int, batch: int) -> DynamicCache:
    """The cache that transformers gives a Llama."""
    cache = filled(model, DynamicCache(config=model.config), length)
    cache.batch_repeat_interleave(batch)
    return cache


def roomy_cache(model: PreTrainedModel, length: int, batch: int, room: int) -> Cache:
    """A cache that nothing is copied in; see `RoomyLayer`."""
    cache = filled(model, DynamicCache(config=model.config), length)
    for place, layer in enumerate(cache.layers):
        cache.layers[place] = RoomyLayer(layer, batch, room)
    return cache


def bytes_a_text(cache: Cache, batch: int) -> tuple[float, float]:
    """Of keys and values, and of everything else; what a whole batch shares is divided among its texts."""
    if isinstance(cache, HymbaCache):
        shared = [part for pair in cache.meta.values() for part in pair]
        keys_and_values = [*cache.keys.values(), *cache.values.values(), *shared]
        states = [*cache.tails.values(), *cache.states.values()]
    else:
        keys_and_values = [
            part[:, :, : layer.get_seq_length()] for layer in cache.layers for part in (layer.keys, layer.values)
        ]
        states = []
    kept, other = (sum(part.numel() * part.itemsize for part in parts) for parts in (keys_and_values, states))
    return kept / batch, other / batch


@dataclass(frozen=True)
class Decoded:
    """What was measured of a model that generates.

    Attributes:
        model: Its name.
        cache: What kind it keeps.
        batch: Texts side by side.
        measured: Of `STEPS` steps.
        kept: Bytes of keys and values a text.
        states: Bytes of everything else that the cache holds of a text.
    """

    model: str
    cache: str
    batch: int
    measured: Measured
    kept: float
    states: float

    @property
    def speed(self) -> float:
        """Tokens a second, of all texts together."""
        return self.batch * STEPS / self.measured.timing.median

    def row(self) -> Row:
        """Of the table."""
        a_step = {name: cell / STEPS for name, cell in self.measured.cells().items() if isinstance(cell, float)}
        return a_step | {
            "model": self.model,
            "cache": self.cache,
            "batch": self.batch,
            "tokens/s": self.speed,
            "K+V MB": self.kept / 1e6,
            "state MB": self.states / 1e6,
        }


def decode(bench: Bench) -> None:
    """Time generation with both models, each at the largest batch that fits, and compare at the same batch."""
    length = 48 if bench.quick else 8192
    batches = (4, 2) if bench.quick else BATCHES
    room = STEPS * (bench.given.repeats + 8)
    notes = [
        f"random weights in bfloat16, greedy, {length:,} tokens of context; ms: a step, one token more in every text",
        "in place: keys and values are written where there is room for them; copying: transformers' DynamicCache",
        "MB (10^6 bytes): a text's keys and values, and its convolution inputs and SSM states",
    ]
    with bench.table("decode", COLUMNS, notes) as rows:

        def largest(*args: Any) -> Decoded | None:
            found = _largest(bench, length, notes, *args)
            rows.extend([found.row()] if found else [])
            return found

        model = llama(bench.device, quick=bench.quick).eval()
        rival = largest(model, "Llama-3.2-3B", "in place", partial(roomy_cache, room=room), batches)
        same = [rival.batch] if rival else []
        copying = largest(model, "Llama-3.2-3B", "copying", copying_cache, same)
        del model
        free()
        model = hymba(bench.device, quick=bench.quick).eval()
        ours = largest(model, "Hymba-1.5B", "its own", hymba_cache, batches)
        if ours and ours.batch not in same:
            ours = largest(model, "Hymba-1.5B", "its own", hymba_cache, same)
        if ours and rival:
            notes.extend(_comparison(ours, max(rival, copying or rival, key=lambda other: other.speed)))


def _largest(
    bench: Bench,
    length: int,
    notes: list[str],
    model: PreTrainedModel,
    name: str,
    kind: str,
    make: Callable[[PreTrainedModel, int, int], Cache],
    batches: Iterable[int],
) -> Decoded | None:
    """The first of the batches that fits into memory, measured; why others did not is noted."""
    for batch in batches:
        free()
        what = f"{name}, cache {kind}, batch {batch}"
        cache = bench.attempt(what, make, model, length, batch)
        if isinstance(cache, Failure):
            notes.append(f"{what}: {cache}")
            continue
        held = bytes_a_text(cache, batch)
        found = bench.measure(what, {"steps": Generation(model, cache, batch)})["steps"]
        del cache
        if not isinstance(found, Failure):
            return Decoded(name, kind, batch, found, *held)
        notes.append(f"{what}: {found}")
    return None


def _comparison(ours: Decoded, rival: Decoded) -> list[str]:
    """The paper's two figures, at the same batch, against the quicker way to keep Llama's cache."""
    return [
        f"batch {ours.batch}: {ours.speed / rival.speed:.2f} × the tokens a second of {rival.model}, cache "
        f"{rival.cache} (the paper: {PAPER_SPEED} × at 128 on an A100)",
        f"keys and values {rival.kept / ours.kept:.2f} × smaller (the paper: {PAPER_CACHE} ×); with the states "
        f"{rival.kept / (ours.kept + ours.states):.2f} ×",
    ]

"""Generation with a long context: the throughput and cache of Hymba and of Llama-3.2-3B on the same GPU."""

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
"""The paper's batch size, and smaller ones that are tried if it does not fit."""
PAPER_SPEED, PAPER_CACHE = 3.49, 11.67
"""Hymba relative to Llama-3.2-3B: tokens/s at batch 128 on an A100, and KV cache reduction (arXiv 2411.13676)."""
STEPS = 8
"""Tokens generated in one timed call."""


class RoomyLayer(DynamicLayer):
    """Keys and values in preallocated memory, as in serving engines.

    transformers' own layer copies its whole content at every step, which would be most of Llama's time here.

    Args:
        filled: A layer with the keys and values of one text.
        batch: How many copies of that text to hold.
        room: Number of tokens that can be added.
    """

    def __init__(self, filled: DynamicLayer, batch: int, room: int) -> None:
        super().__init__()
        self.lazy_initialization(filled.keys, filled.values)
        self.length = filled.get_seq_length()
        self.keys, self.values = (self._with_room(tensor, batch, room) for tensor in (filled.keys, filled.values))

    @staticmethod
    def _with_room(tensor: Tensor, batch: int, room: int) -> Tensor:
        _, heads, length, width = tensor.shape
        memory = tensor.new_empty(batch, heads, length + room, width)
        memory[:, :, :length] = tensor
        return memory

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values ``(batch, heads, tokens, width)``; returns views of all of them."""
        new = slice(self.length, self.length + key_states.shape[-2])
        self.length = new.stop
        self.keys[:, :, new], self.values[:, :, new] = key_states, value_states
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def get_seq_length(self) -> int:
        """Number of tokens in the layer."""
        return self.length


class Generation:
    """Greedy decoding of a batch: each call adds `STEPS` tokens to every text.

    Args:
        model: The model.
        cache: A cache with ``batch`` texts.
        batch: Number of texts.
    """

    def __init__(self, model: PreTrainedModel, cache: Cache, batch: int) -> None:
        self.model = model
        self.cache = cache
        self.ids = random_ids(model, batch, 1)

    @torch.no_grad()
    def __call__(self) -> None:
        """Generate `STEPS` tokens."""
        for _ in range(STEPS):
            logits = self.model(input_ids=self.ids, **{CACHE_NAME: self.cache}, use_cache=True, logits_to_keep=1).logits
            self.ids = logits[:, -1:].argmax(-1)


@torch.no_grad()
def filled(model: PreTrainedModel, cache: Cache, length: int) -> Cache:
    """The cache, filled with one random text of this length."""
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
    """Llama's cache with preallocated memory; see `RoomyLayer`."""
    cache = filled(model, DynamicCache(config=model.config), length)
    for place, layer in enumerate(cache.layers):
        cache.layers[place] = RoomyLayer(layer, batch, room)
    return cache


def bytes_per_text(cache: Cache, batch: int) -> tuple[float, float]:
    """Bytes per text of keys and values, and of everything else; memory shared by the batch is divided by its size."""
    if isinstance(cache, HymbaCache):
        shared = [part for pair in cache.meta.values() for part in pair]
        keys_and_values = [*cache.keys.values(), *cache.values.values(), *shared]
        states = [*cache.tails.values(), *cache.states.values()]
    else:
        keys_and_values = [
            part[:, :, : layer.get_seq_length()] for layer in cache.layers for part in (layer.keys, layer.values)
        ]
        states = []
    kv_bytes, state_bytes = (sum(part.numel() * part.itemsize for part in parts) for parts in (keys_and_values, states))
    return kv_bytes / batch, state_bytes / batch


@dataclass(frozen=True)
class Decoded:
    """Measurements of a model's generation.

    Attributes:
        model: The model's name.
        cache: The kind of cache.
        batch: Number of texts in the batch.
        measured: Time and memory of `STEPS` steps.
        kv_bytes: Bytes of keys and values per text.
        state_bytes: Bytes of everything else in the cache per text.
    """

    model: str
    cache: str
    batch: int
    measured: Measured
    kv_bytes: float
    state_bytes: float

    @property
    def speed(self) -> float:
        """Tokens per second of all texts together."""
        return self.batch * STEPS / self.measured.timing.median

    def row(self) -> Row:
        """A row of the table."""
        per_step = {name: cell / STEPS for name, cell in self.measured.cells().items() if isinstance(cell, float)}
        return per_step | {
            "model": self.model,
            "cache": self.cache,
            "batch": self.batch,
            "tokens/s": self.speed,
            "K+V MB": self.kv_bytes / 1e6,
            "state MB": self.state_bytes / 1e6,
        }


def decode(bench: Bench) -> None:
    """Time generation of both models, each at the largest batch that fits, and compare them at the same batch."""
    length = 48 if bench.quick else 8192
    batches = (4, 2) if bench.quick else BATCHES
    room = STEPS * (bench.options.repeats + 8)
    notes = [
        f"random weights in bfloat16, greedy, {length:,} tokens of context; ms: per step, one token for every text",
        "in place: keys and values are written into preallocated memory; copying: transformers' DynamicCache",
        "MB (10^6 bytes): per text, of keys and values, and of convolution inputs and SSM states",
    ]
    with bench.table("decode", COLUMNS, notes) as rows:

        def largest(*args: Any) -> Decoded | None:
            decoded = _largest(bench, length, notes, *args)
            rows.extend([decoded.row()] if decoded else [])
            return decoded

        model = llama(bench.device, quick=bench.quick).eval()
        rival = largest(model, "Llama-3.2-3B", "in place", partial(roomy_cache, room=room), batches)
        same_batch = [rival.batch] if rival else []
        copying = largest(model, "Llama-3.2-3B", "copying", copying_cache, same_batch)
        del model
        free()
        model = hymba(bench.device, quick=bench.quick).eval()
        ours = largest(model, "Hymba-1.5B", "its own", hymba_cache, batches)
        if ours and ours.batch not in same_batch:
            ours = largest(model, "Hymba-1.5B", "its own", hymba_cache, same_batch)
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
    """Measure the first batch size that fits into memory; failures of the others go to the notes."""
    for batch in batches:
        free()
        what = f"{name}, cache {kind}, batch {batch}"
        cache = bench.attempt(what, make, model, length, batch)
        if isinstance(cache, Failure):
            notes.append(f"{what}: {cache}")
            continue
        cache_bytes = bytes_per_text(cache, batch)
        measured = bench.measure(what, {"steps": Generation(model, cache, batch)})["steps"]
        del cache
        if not isinstance(measured, Failure):
            return Decoded(name, kind, batch, measured, *cache_bytes)
        notes.append(f"{what}: {measured}")
    return None


def _comparison(ours: Decoded, rival: Decoded) -> list[str]:
    """The paper's two figures at the same batch size, against the faster of Llama's two caches."""
    return [
        f"batch {ours.batch}: {ours.speed / rival.speed:.2f} × the tokens/s of {rival.model}, cache "
        f"{rival.cache} (the paper: {PAPER_SPEED} × at 128 on an A100)",
        f"keys and values {rival.kv_bytes / ours.kv_bytes:.2f} × smaller (the paper: {PAPER_CACHE} ×); with the states "
        f"{rival.kv_bytes / (ours.kv_bytes + ours.state_bytes):.2f} ×",
    ]

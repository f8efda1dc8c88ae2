"""Generation with a long context: the throughput and cache of Hymba and of Llama-3.2-3B on the same GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from gpu_journal import Row, Table
from gpu_measure import TIMES, TIMES_NOTES, Bench, Failure, Measured, free
from gpu_models import hymba, llama, random_ids
from gpu_profile import host_waits
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from hymba_tune.model import HymbaCache
from hymba_tune.model.cache import CACHE_NAME
from hymba_tune.model.fixed_cache import FixedCache
from hymba_tune.model.step_graphs import StepGraphs

COLUMNS = ("model", "cache", "batch", *TIMES, "launches", "host waits", "tokens/s", "K+V MB", "state MB")
LARGE = (128, 64, 32, 16, 8, 4, 2)
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

    With a cache of fixed size, each step is a CUDA graph on a GPU.

    Args:
        model: The model.
        cache: A cache with ``batch`` texts.
        batch: Number of texts.
    """

    def __init__(self, model: PreTrainedModel, cache: Cache, batch: int) -> None:
        self.model = model
        self.cache = cache
        self.ids = random_ids(model, batch, 1)
        self.graphs = StepGraphs() if isinstance(cache, FixedCache) and model.device.type == "cuda" else None

    @torch.no_grad()
    def __call__(self) -> None:
        """Generate `STEPS` tokens."""
        for _ in range(STEPS):
            if self.graphs:
                self.graphs.run("step", self._step)
            else:
                self._step()

    def _step(self) -> Tensor:
        logits = self.model(input_ids=self.ids, **{CACHE_NAME: self.cache}, use_cache=True, logits_to_keep=1).logits
        return self.ids.copy_(logits[:, -1:].argmax(-1))


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


def fixed_cache(model: PreTrainedModel, length: int, batch: int, room: int) -> FixedCache:
    """Hymba's cache of fixed size, with room for some tokens more."""
    cache = hymba_cache(model, length, batch)
    fixed = FixedCache(model.config, cache, batch, length + room)
    fixed.join(cache)
    return fixed


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
        waits: How often `STEPS` steps wait for the device.
    """

    model: str
    cache: str
    batch: int
    measured: Measured
    kv_bytes: float
    state_bytes: float
    waits: int | None

    @property
    def speed(self) -> float:
        """Tokens per second of all texts together."""
        return self.batch * STEPS / self.measured.timing.median

    def row(self) -> Row:
        """A row of the table: times, launches and waits are those of a step, which gives each text a token."""
        cells = self.measured.cells()
        first, launches = cells.pop("first s"), cells.pop("launches")
        per_step = {name: cell / STEPS for name, cell in cells.items() if isinstance(cell, float)}
        return per_step | {
            "model": self.model,
            "cache": self.cache,
            "batch": self.batch,
            "first s": first,
            "launches": launches and int(launches) // STEPS,
            "host waits": self.waits and self.waits / STEPS,
            "tokens/s": self.speed,
            "K+V MB": self.kv_bytes / 1e6,
            "state MB": self.state_bytes / 1e6,
        }


def decode(bench: Bench) -> None:
    """Time generation of Hymba alone and in a large batch, then of Llama in the same process, and compare them."""
    length = 48 if bench.quick else 8192
    large = (4, 2) if bench.quick else LARGE
    notes = [
        f"random weights in bfloat16, greedy, {length:,} tokens of context; ms: per step, one token for every text",
        "CUDA graphs: Hymba's cache of fixed size, whose steps are replayed; off a GPU they run as usual",
        "in place: keys and values are written into preallocated memory; copying: transformers' DynamicCache",
        "MB (10^6 bytes): per text, of keys and values, and of convolution inputs and SSM states",
        *TIMES_NOTES,
    ]
    with bench.table("decode", COLUMNS, notes) as table:
        run = _Run(bench, table, length)
        room = STEPS * (4 * bench.options.repeats + 8)  # a round makes two calls
        own_kinds = {"its own": hymba_cache, "CUDA graphs": partial(fixed_cache, room=room)}
        ours = run.of(hymba, "Hymba-1.5B", own_kinds, [(1,), large])
        kinds = {"in place": partial(roomy_cache, room=room), "copying": copying_cache}
        rivals = run.of(llama, "Llama-3.2-3B", kinds, [(1,), large])
        missing = {one.batch for one in rivals} - {one.batch for one in ours}
        if missing:  # Llama's largest batch is smaller
            ours += run.of(hymba, "Hymba-1.5B", own_kinds, [(batch,) for batch in missing])
        for own in ours:
            same = [rival for rival in rivals if rival.batch == own.batch]
            if same:
                table.note(*_comparison(own, max(same, key=lambda rival: rival.speed)))


@dataclass(frozen=True)
class _Run:
    """Measures models one after the other.

    Attributes:
        bench: The run of the benchmark.
        table: Where the rows go.
        length: The tokens of a text.
    """

    bench: Bench
    table: Table
    length: int

    def of(
        self,
        load: Callable[..., PreTrainedModel],
        name: str,
        caches: Mapping[str, Callable[[PreTrainedModel, int, int], Cache]],
        wanted: Sequence[tuple[int, ...]],
    ) -> list[Decoded]:
        """Add a row for each cache, at the first batch of each tuple that fits; the model is freed at the end."""
        model = load(self.bench.device, quick=self.bench.quick).eval()
        found = [self._largest(model, name, kind, make, sizes) for sizes in wanted for kind, make in caches.items()]
        del model
        free()
        return [decoded for decoded in found if decoded is not None]

    def _largest(
        self,
        model: PreTrainedModel,
        name: str,
        kind: str,
        make: Callable[[PreTrainedModel, int, int], Cache],
        batches: Iterable[int],
    ) -> Decoded | None:
        """Measure the first batch that fits into memory; failures of the others go to the notes."""
        for batch in batches:
            free()
            what = f"{name}, cache {kind}, batch {batch}"
            cache = self.bench.attempt(what, make, model, self.length, batch)
            if isinstance(cache, Failure):
                self.table.note(f"{what}: {cache}")
                continue
            cache_bytes = bytes_per_text(cache, batch)
            generation = Generation(model, cache, batch)
            measured = self.bench.measure(what, {"steps": generation})["steps"]
            if isinstance(measured, Failure):
                del cache, generation
                self.table.note(f"{what}: {measured}")
                continue
            decoded = Decoded(name, kind, batch, measured, *cache_bytes, host_waits(generation, self.bench.device))
            self.table.add(decoded.row())
            return decoded
        return None


def _comparison(ours: Decoded, rival: Decoded) -> list[str]:
    """The paper's two figures at the same batch size, against the faster of Llama's two caches."""
    return [
        f"batch {ours.batch}, cache {ours.cache}: {ours.speed / rival.speed:.2f} × the tokens/s of {rival.model}, "
        f"cache {rival.cache} (the paper: {PAPER_SPEED} × at 128 on an A100)",
        f"keys and values {rival.kv_bytes / ours.kv_bytes:.2f} × smaller (the paper: {PAPER_CACHE} ×); with the states "
        f"{rival.kv_bytes / (ours.kv_bytes + ours.state_bytes):.2f} ×",
    ]

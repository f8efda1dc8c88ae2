"""The cache of generation: keys and values, convolution inputs and SSM states of the texts so far.

Glossary: S texts, T new tokens, L largest number of new tokens of a text, K keys that a new token looks at, G key/value
heads, C columns of a buffer.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import fields
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from .configuration_hymba import HymbaConfig
from .documents import Documents

GROWTH = 32
"""The number of columns that a full buffer gains at a time. Copying it then costs little next to reading it."""
CACHE_NAME = next(f.name for f in fields(BaseModelOutputWithPast) if f.name in ("cache", "past_key_values"))
"""The name under which models of this transformers take and return a cache: "past_key_values" before 5.24."""


class VisibleKeys(NamedTuple):
    """The keys and values that the new tokens can attend to.

    Attributes:
        key: Keys ``(S, G, K, a)``.
        value: Values ``(S, G, K, v)``.
        positions: ``(S, K)``, the position of each key in its text; negative where there is no key.
    """

    key: Tensor
    value: Tensor
    positions: Tensor


class HymbaCache(Cache):
    """Keys and values, convolution inputs and SSM states of S texts, each of its own length.

    Layers that compute keys and values store them here; layers that reuse those of another layer store none. Token t of
    a text is in column t modulo C of its buffer. Buffers grow with the longest text, but a windowed buffer stops
    growing when it holds a window and the token that looks at it. From then on, a new token overwrites the token that
    has left the window, and no other token moves. Keys and values of the meta tokens are stored once for all texts.

    Attributes:
        lengths: ``(S,)``, the number of tokens of each text so far, without padding; None before the first pass.
        meta: Keys ``(M, G, a)`` and values ``(M, G, v)`` of the meta tokens, by layer.
        keys: Keys ``(S, G, C, a)``, by layer.
        values: Values ``(S, G, C, v)``, by layer.
        tails: Last inputs of the convolutions ``(S, width - 1, E)``, by layer.
        states: SSM states ``(S, E, N)`` in float32, by layer.
    """

    is_compileable = False
    is_croppable = False
    # PEFT's prefix tuning reads this before `forward` can refuse its cache; -1 is no limit.
    max_cache_len = -1
    # `generate` reads this from the layers of a cache. This cache has no layers, and its keys count tokens.
    is_linear = (False,)

    def __init__(self, config: HymbaConfig) -> None:
        super().__init__(layers=[])
        self.lengths: Tensor | None = None
        self.meta: dict[int, tuple[Tensor, Tensor]] = {}
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.tails: dict[int, Tensor] = {}
        self.states: dict[int, Tensor] = {}

        self._columns = 0
        # Upper bounds of the texts' lengths, and of the longest one, counted on the CPU: reading `lengths` would wait
        # for the device.
        self._sizes: list[int] = []
        self._longest = 0

        # A windowed layer must store all of its keys if a global layer reuses them.
        layers = range(config.num_hidden_layers)
        unbounded = {config.kv_source(layer) for layer in layers if config.is_global(layer)}
        window = config.sliding_window
        self._limits = {layer: window + 1 for layer in layers if window is not None and layer not in unbounded}

        # These hold for one pass only. Layers with buffers of one size share the slots, and layers of one window the
        # mask, so that a step of generation computes each of them once.
        self._visible: dict[int, VisibleKeys]
        self._slots: dict[int, _Slots]
        self._masks: dict[tuple[int, int | None], Tensor]
        self._forget_pass()

    def store_meta(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Store the keys ``(M, G, a)`` and values ``(M, G, v)`` of the meta tokens."""
        # A view would keep the keys and values of the whole prompt in memory.
        self.meta[layer] = key.clone(), value.clone()

    def extend(self, layer: int, key: Tensor, value: Tensor, documents: Documents) -> None:
        """Store the keys ``(T, G, a)`` and values ``(T, G, v)`` of the new tokens."""
        buffer = self.keys.get(layer)
        new = max(documents.lengths)
        longest = self._longest + new

        columns = self._columns_for(layer, longest)

        # A single new token overwrites a token that it does not see. Several new tokens would overwrite tokens that the
        # first of them still sees, so these are read before they are overwritten.
        if buffer is not None and longest > columns and new > 1:
            self._visible[layer] = self._visible_before_writing(layer, key, value, documents)

        if columns not in self._slots:
            self._slots[columns] = _Slots.find(documents, columns)
        slots = self._slots[columns]
        self.keys[layer] = _write(buffer, key, slots)
        self.values[layer] = _write(self.values.get(layer), value, slots)
        self._visible.setdefault(layer, VisibleKeys(self.keys[layer], self.values[layer], slots.positions))

    def reserve(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return the buffers of keys and values of a layer, with a column for one new token of each text.

        The new token of text s belongs into column ``lengths[s] % C``.
        """
        columns = self._columns_for(layer, self._longest + 1)
        for buffers in (self.keys, self.values):
            if (missing := columns - buffers[layer].shape[2]) > 0:
                # A buffer that is still to grow has not wrapped around, so its tokens keep their columns.
                buffers[layer] = torch.nn.functional.pad(buffers[layer], (0, 0, 0, missing))
        return self.keys[layer], self.values[layer]

    def _forget_pass(self) -> None:
        """Forget what holds for one pass only."""
        self._visible, self._slots, self._masks = {}, {}, {}

    def _columns_for(self, layer: int, longest: int) -> int:
        """Return the columns that the buffers of a layer need for a text of a length.

        The first pass allocates only its own columns. A full buffer then grows by several, so that few steps copy it.
        """
        buffer = self.keys.get(layer)
        limit = self._limits.get(layer, longest + GROWTH)
        if buffer is None:
            return min(limit, longest)
        return buffer.shape[2] if longest <= buffer.shape[2] else min(limit, longest + GROWTH)

    def store_ssm(self, layer: int, tails: Tensor, states: Tensor) -> None:
        """Store the last inputs of the convolution and the SSM states after the new tokens."""
        self.tails[layer] = tails
        self.states[layer] = states

    def seen(self, layer: int) -> VisibleKeys:
        """Return the keys and values of a layer for the new tokens, after they were stored in this pass."""
        if layer not in self._visible:
            # The pass of one new token writes into the buffers itself.
            assert self.lengths is not None
            key = self.keys[layer]
            self._visible[layer] = VisibleKeys(key, self.values[layer], _positions(self.lengths + 1, key.shape[2]))
        return self._visible[layer]

    def hidden(self, layer: int, documents: Documents, window: int | None) -> Tensor:
        """Return which of the keys of `seen` each new token does not see.

        Args:
            layer: The layer that computed the keys.
            documents: The layout of the new tokens.
            window: The number of earlier tokens that a query sees, or None for the whole text.

        Returns:
            ``(S, L, K)`` bool, padded on the left.
        """
        positions = self._visible[layer].positions
        if (mask_key := (id(positions), window)) not in self._masks:
            queries, keys = _new_positions(documents)[:, :, None], positions[:, None]
            hidden = (keys < 0) | (keys > queries)
            self._masks[mask_key] = hidden if window is None else hidden | (queries - keys > window)
        return self._masks[mask_key]

    def advance(self, documents: Documents) -> None:
        """Count the new tokens, after every layer has stored its part of them."""
        new = documents.cu_seqlens.diff()
        self.lengths = new if documents.past is None else documents.past + new
        sizes = self._sizes or [0] * len(documents.lengths)
        self._sizes = [size + length for size, length in zip(sizes, documents.lengths, strict=True)]
        self._columns += documents.shape[1]
        self._longest += max(documents.lengths)
        self._forget_pass()

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002 (all layers have the same length)
        """Return the number of input columns so far, including padding, as `generate` counts them."""
        return self._columns

    def get_max_length(self, layer_idx: int | None = None) -> int:  # noqa: ARG002 (no layer has one)
        """Return -1, which means no maximum to transformers and PEFT: buffers grow with the texts."""
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace the text of row i by the text that was in row ``beam_idx[i]``."""
        self._sizes = [max(self._sizes, default=0)] * len(beam_idx)
        if self.lengths is not None:
            beam_idx = beam_idx.to(self.lengths.device, non_blocking=True)
        self._map_texts(lambda tensor: tensor.index_select(0, beam_idx))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows only; indices on the CPU do not wait for the device."""
        rows = indices.tolist()
        sizes = self._sizes
        self.reorder_cache(indices)
        if self.lengths is not None:
            sizes = [sizes[row] for row in rows]
            self._sizes, self._longest = sizes, max(sizes)
            # Windowed buffers are not cut, since their tokens may have wrapped around.
            for buffers in (self.keys, self.values):
                unbounded = [layer for layer in buffers if layer not in self._limits]
                buffers.update({layer: buffers[layer][:, :, : self._longest] for layer in unbounded})

    def text(self, row: int) -> HymbaCache:
        """Return a copy of the cache of one text, with buffers no longer than it needs."""
        assert self.lengths is not None
        one = copy(self)
        one._forget_pass()
        one.lengths = self.lengths[row : row + 1].clone()
        one._sizes = [self._sizes[row]]
        one._columns = one._longest = self._sizes[row]
        # A buffer longer than its text has not wrapped around. One column is left where there is no token yet.
        columns = max(one._longest, 1)
        for name in ("keys", "values"):
            buffers = getattr(self, name).items()
            setattr(one, name, {layer: buffer[row : row + 1, :, :columns].clone() for layer, buffer in buffers})
        for name in ("tails", "states"):
            setattr(one, name, {layer: x[row : row + 1].clone() for layer, x in getattr(self, name).items()})
        return one

    @property
    def nbytes(self) -> int:
        """The bytes of all texts, without the meta tokens, which caches of one model may share."""
        return sum(x.nbytes for tensors in self._by_text for x in tensors.values())

    def nbytes_of(self, count: int, length: int) -> int:
        """Return the bytes of a cache of the same model for texts up to a length, after at least one pass with this.

        Args:
            count: The number of texts.
            length: The number of tokens of the longest one.
        """
        assert self.lengths is not None
        total = sum(x[0].nbytes for tensors in (self.tails, self.states) for x in tensors.values())
        for buffers in (self.keys, self.values):
            for layer, buffer in buffers.items():
                columns = min(self._limits.get(layer, length + GROWTH), length + GROWTH)
                total += buffer[0, :, 0].nbytes * columns
        return total * count

    def join(self, other: HymbaCache) -> None:
        """Append the texts of another cache, which does not change.

        Args:
            other: A cache of the same model, after at least one pass.

        Raises:
            ValueError: If one of the caches is empty.
        """
        if self.lengths is None or other.lengths is None:
            raise ValueError("an empty cache cannot be joined; run a forward pass with each cache first")
        # Layer by layer, so that the old and the new tensors of one layer only are in memory at the same time.
        for own, added in ((self.keys, other.keys), (self.values, other.values)):
            # A buffer with fewer columns has not wrapped around, so its tokens keep their columns in a longer buffer.
            for layer in own:
                own[layer] = _concatenated(own[layer], added[layer])
        for own, added in ((self.tails, other.tails), (self.states, other.states)):
            for layer in own:
                own[layer] = torch.cat([own[layer], added[layer]])

        self.lengths = torch.cat([self.lengths, other.lengths])
        self._sizes = self._sizes + other._sizes
        self._columns = max(self._columns, other._columns)
        self._longest = max(self._longest, other._longest)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every text ``repeats`` times, with its copies in consecutive rows."""
        self._sizes = [size for size in self._sizes for _ in range(repeats)]
        self._map_texts(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def reset(self) -> None:
        """Remove all texts."""
        self.lengths = None
        self._columns = 0
        self._sizes = []
        self._longest = 0
        self.meta.clear()
        for tensors in self._by_text:
            tensors.clear()

    def crop(self, max_length: int) -> None:
        """Refuse to crop, since an SSM state cannot be reset to an earlier token.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            f"HymbaCache cannot be cropped to {max_length} tokens: its SSM states belong to the last token. "
            "Assisted decoding needs cropping and does not work with Hymba; generate without an assistant."
        )

    def _visible_before_writing(self, layer: int, key: Tensor, value: Tensor, documents: Documents) -> VisibleKeys:
        """Return the stored keys and values followed by the new ones, before any of the stored ones is overwritten."""
        assert documents.past is not None
        old_key, old_value = self.keys[layer], self.values[layer]
        old_positions = _positions(documents.past, old_key.shape[2])

        # The grid has zeros in front of the new tokens of shorter texts, which no query may see.
        new_positions = _new_positions(documents)
        new_positions = new_positions.where(new_positions >= documents.past[:, None], -1)
        return VisibleKeys(
            torch.cat([old_key, documents.to_grid(key).transpose(1, 2)], 2),
            torch.cat([old_value, documents.to_grid(value).transpose(1, 2)], 2),
            torch.cat([old_positions, new_positions], 1),
        )

    @property
    def _by_text(self) -> tuple[dict[int, Tensor], ...]:
        return self.keys, self.values, self.tails, self.states

    def _map_texts(self, function: Callable[[Tensor], Tensor]) -> None:
        for tensors in self._by_text:
            for layer in tensors:
                tensors[layer] = function(tensors[layer])
        if self.lengths is not None:
            self.lengths = function(self.lengths)


class _Slots(NamedTuple):
    """Where the new tokens are written in buffers of C columns.

    Attributes:
        rows: The tokens, among the T new ones, that are written; None for all.
        texts: The text of each written token.
        columns: The column of each written token.
        positions: ``(S, C)``, the position in its text of the token that each column then holds; negative if none.
    """

    rows: Tensor | None
    texts: Tensor
    columns: Tensor
    positions: Tensor

    @classmethod
    def find(cls, documents: Documents, count: int) -> _Slots:
        """Return the slots of the tokens of a pass in buffers of ``count`` columns."""
        ids = documents.ids
        starts = documents.cu_seqlens[:-1]
        first = -starts if documents.past is None else documents.past - starts
        positions = torch.arange(len(ids), device=ids.device) + first[ids]

        rows = None
        if max(documents.lengths) > count:
            # Only the last of the tokens that share a column is written: the result of writing several is undefined.
            ends = documents.cu_seqlens[1:][ids]
            total = sum(min(length, count) for length in documents.lengths)
            is_written = torch.arange(len(ids), device=ids.device) >= ends - count
            # Sorting gives a result of known size; selecting by the mask would wait for the device.
            rows = is_written.int().argsort(descending=True, stable=True)[:total]
            ids, positions = ids[rows], positions[rows]

        lengths = documents.cu_seqlens.diff() + (0 if documents.past is None else documents.past)
        return cls(rows, ids, positions % count, _positions(lengths, count))


def _write(old: Tensor | None, new: Tensor, slots: _Slots) -> Tensor:
    """Write ``(T, G, width)`` tokens into a buffer ``(S, G, C, width)``, which is replaced if it is too short."""
    count, columns = slots.positions.shape
    buffer = old
    if old is None or old.shape[2] < columns:
        buffer = new.new_zeros(count, new.shape[1], columns, new.shape[2])
        if old is not None:
            buffer[:, :, : old.shape[2]] = old
    assert buffer is not None
    buffer[slots.texts, :, slots.columns] = new if slots.rows is None else new[slots.rows]
    return buffer


def _concatenated(one: Tensor, other: Tensor) -> Tensor:
    """Concatenate buffers ``(S, G, C, width)`` of different texts, padded to the same number of columns."""
    columns = max(one.shape[2], other.shape[2])
    return torch.cat([torch.nn.functional.pad(x, (0, 0, 0, columns - x.shape[2])) for x in (one, other)])


def _positions(lengths: Tensor, columns: int) -> Tensor:
    """Return ``(S, columns)``: the position in its text of the newest token of each column, negative if none."""
    last = lengths[:, None] - 1
    return last - (last - torch.arange(columns, device=lengths.device)) % columns


def _new_positions(documents: Documents) -> Tensor:
    """Return ``(S, L)``: the positions of the new tokens in their texts, padded on the left."""
    assert documents.past is not None  # a first pass attends without the cache
    longest = max(documents.lengths)
    lengths = documents.past + documents.cu_seqlens.diff()
    return lengths[:, None] - longest + torch.arange(longest, device=lengths.device)

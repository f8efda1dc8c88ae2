"""What generation keeps of the texts it goes on with.

Glossary: S texts, T new tokens, L the most new tokens that a text has, G key/value heads, C columns of a buffer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from .configuration_hymba import HymbaConfig
from .documents import Documents

GROWTH = 32
"""Columns that a full buffer gains at a time: copying it is then a small part of reading it."""
CACHE_NAME = next(f.name for f in fields(BaseModelOutputWithPast) if f.name in ("cache", "past_key_values"))
"""What this transformers calls a cache where a model takes and returns it: "past_key_values" before 5.24."""


class VisibleKeys(NamedTuple):
    """What the new tokens of continued texts look at.

    Attributes:
        key: ``(S, G, K, a)``.
        value: ``(S, G, K, v)``.
        positions: ``(S, K)`` place of each key in its text; negative where there is none.
    """

    key: Tensor
    value: Tensor
    positions: Tensor


class HymbaCache(Cache):
    """Keys and values, convolution inputs and SSM states of S texts, each of its own length.

    Layers that make keys and values keep those of their texts; layers that reuse another's keep none. Token t of a
    text stands in column t modulo C of its buffer. Buffers grow with the longest text, windowed ones only until they
    hold a window and the token that looks at it: from then on a new token takes the column of the one that has left
    the window, and nothing is moved. Keys and values of the meta tokens are kept once for all texts.

    Attributes:
        lengths: ``(S,)`` tokens of each text so far, padding not counted; None before the first pass.
        meta: Keys ``(M, G, a)`` and values ``(M, G, v)`` of the meta tokens, by layer.
        keys: Keys ``(S, G, C, a)``, by layer.
        values: Values ``(S, G, C, v)``, by layer.
        tails: Last inputs of the convolutions ``(S, width - 1, E)``, by layer.
        states: SSM states ``(S, E, N)`` in float32, by layer.
    """

    is_compileable = False
    is_croppable = False
    is_linear = (False,)  # some of it counts tokens, which `generate` asks of the layers it does not have

    def __init__(self, config: HymbaConfig) -> None:
        super().__init__(layers=[])
        self.lengths: Tensor | None = None
        self.meta: dict[int, tuple[Tensor, Tensor]] = {}
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.tails: dict[int, Tensor] = {}
        self.states: dict[int, Tensor] = {}
        self._columns = 0
        self._longest = 0  # the longest text has no more tokens than this; known without waiting for the device
        # A windowed layer whose keys a global one reuses has to keep them all.
        layers = range(config.num_hidden_layers)
        unbounded = {config.kv_source(layer) for layer in layers if config.is_global(layer)}
        window = config.sliding_window
        self._limits = {layer: window + 1 for layer in layers if window is not None and layer not in unbounded}
        # Of one pass: what tokens look at, where they go, and which keys are hidden from them.
        self._seen: dict[int, VisibleKeys] = {}
        self._places: dict[int, _Places] = {}
        self._hidden: dict[tuple[int, int | None], Tensor] = {}

    def store_meta(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Keep the meta tokens' keys ``(M, G, a)`` and values ``(M, G, v)``."""
        self.meta[layer] = key.clone(), value.clone()

    def extend(self, layer: int, key: Tensor, value: Tensor, documents: Documents) -> None:
        """Add the new tokens' keys ``(T, G, a)`` and values ``(T, G, v)``."""
        held, new = self.keys.get(layer), max(documents.lengths)
        reach = self._longest + new
        limit = self._limits.get(layer, reach + GROWTH)
        columns = min(limit, reach)
        if held is not None:
            columns = held.shape[2] if reach <= held.shape[2] else min(limit, reach + GROWTH)
        # One token takes the column of a token that it does not see; several would take those that the first still do.
        if held is not None and reach > columns and new > 1:
            self._seen[layer] = self._seen_beside(layer, key, value, documents)
        if columns not in self._places:
            self._places[columns] = _Places.find(documents, columns)
        places = self._places[columns]
        self.keys[layer] = _write(held, key, places)
        self.values[layer] = _write(self.values.get(layer), value, places)
        self._seen.setdefault(layer, VisibleKeys(self.keys[layer], self.values[layer], places.positions))

    def seen(self, layer: int) -> VisibleKeys:
        """What the new tokens look at in a layer that `extend` was called for in this pass."""
        return self._seen[layer]

    def hidden(self, layer: int, documents: Documents, window: int | None) -> Tensor:
        """Which of what is `seen` in a layer each new token does not see.

        Args:
            layer: The layer that made the keys.
            documents: Texts that this cache goes on with.
            window: Tokens a query looks back, or None for the whole text.

        Returns:
            ``(S, L, K)`` bool, each text's tokens flush at the right.
        """
        positions = self._seen[layer].positions
        if (known := (id(positions), window)) not in self._hidden:
            queries, keys = _new_positions(documents)[:, :, None], positions[:, None]
            hidden = (keys < 0) | (keys > queries)
            self._hidden[known] = hidden if window is None else hidden | (queries - keys > window)
        return self._hidden[known]

    def advance(self, documents: Documents) -> None:
        """Count the new tokens, after every layer has kept its part of them."""
        new = documents.cu_seqlens.diff()
        self.lengths = new if documents.past is None else documents.past + new
        self._columns += documents.shape[1]
        self._longest += max(documents.lengths)
        for memory in (self._seen, self._places, self._hidden):
            memory.clear()

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002 (every layer has seen the same)
        """Columns of input seen so far, padding counted, as `generate` counts them."""
        return self._columns

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i go on with the text that was row ``beam_idx[i]``."""
        self._map_texts(lambda held: held.index_select(0, beam_idx.to(held.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows only."""
        self.reorder_cache(indices)
        if self.lengths is not None:
            self._longest = int(self.lengths.max())
            for held in (self.keys, self.values):  # windowed buffers stay as they are: their tokens may go round
                whole = [layer for layer in held if layer not in self._limits]
                held.update({layer: held[layer][:, :, : self._longest] for layer in whole})

    def join(self, other: HymbaCache) -> None:
        """Hold another cache's texts as well, behind those held so far.

        Args:
            other: A cache of the same model, after a pass. It cannot be used afterwards.
        """
        if self.lengths is None or other.lengths is None:
            raise ValueError("a cache that has seen no text joins with none")
        for held, added in ((self.keys, other.keys), (self.values, other.values)):
            # A buffer with fewer columns has never gone round: its tokens stand where they stand in a longer one.
            held.update({layer: _concatenated(held[layer], added[layer]) for layer in held})
        for held, added in ((self.tails, other.tails), (self.states, other.states)):
            held.update({layer: torch.cat([held[layer], added[layer]]) for layer in held})
        self.lengths = torch.cat([self.lengths, other.lengths])
        self._columns, self._longest = max(self._columns, other._columns), max(self._longest, other._longest)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Hold every text ``repeats`` times, copies side by side."""
        self._map_texts(lambda held: held.repeat_interleave(repeats, 0))

    def reset(self) -> None:
        """Forget every text."""
        self.lengths, self._columns, self._longest = None, 0, 0
        for held in (self.meta, self.keys, self.values, self.tails, self.states):
            held.clear()

    def crop(self, max_length: int) -> None:
        """Refused: an SSM state cannot be taken back to an earlier token.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            f"HymbaCache cannot be cropped to {max_length} tokens: its SSM states are those of the last token. "
            "Assisted decoding needs this and does not work with Hymba."
        )

    def _seen_beside(self, layer: int, key: Tensor, value: Tensor, documents: Documents) -> VisibleKeys:
        """What is held, with the new tokens beside it instead of in their columns."""
        assert documents.past is not None
        held_key, held_value, new = self.keys[layer], self.values[layer], _new_positions(documents)
        return VisibleKeys(
            torch.cat([held_key, documents.to_grid(key).transpose(1, 2)], 2),
            torch.cat([held_value, documents.to_grid(value).transpose(1, 2)], 2),
            torch.cat(
                # Shorter texts have zeros in front of their new tokens.
                [_positions(documents.past, held_key.shape[2]), new.where(new >= documents.past[:, None], -1)],
                1,
            ),
        )

    def _map_texts(self, move: Callable[[Tensor], Tensor]) -> None:
        for held in (self.keys, self.values, self.tails, self.states):
            held.update({layer: move(tensor) for layer, tensor in held.items()})
        if self.lengths is not None:
            self.lengths = move(self.lengths)


class _Places(NamedTuple):
    """Where new tokens go in buffers of C columns.

    Attributes:
        rows: Those of the T tokens that stay, or None for all.
        texts: Number of the text of each of them.
        columns: The column that each of them takes.
        positions: ``(S, C)`` place in its text of what then stands in each column; negative for nothing.
    """

    rows: Tensor | None
    texts: Tensor
    columns: Tensor
    positions: Tensor

    @classmethod
    def find(cls, documents: Documents, count: int) -> _Places:
        """The places of a pass's tokens."""
        ids, starts = documents.ids, documents.cu_seqlens[:-1]
        first = -starts if documents.past is None else documents.past - starts
        positions = torch.arange(len(ids), device=ids.device) + first[ids]
        rows = None
        if max(documents.lengths) > count:  # of a text's tokens that share a column the last one stays
            ends = documents.cu_seqlens[1:][ids]
            total = sum(min(length, count) for length in documents.lengths)
            lasting = torch.arange(len(ids), device=ids.device) >= ends - count
            rows = lasting.int().argsort(descending=True, stable=True)[:total]
            ids, positions = ids[rows], positions[rows]
        lengths = documents.cu_seqlens.diff() + (0 if documents.past is None else documents.past)
        return cls(rows, ids, positions % count, _positions(lengths, count))


def _write(held: Tensor | None, new: Tensor, places: _Places) -> Tensor:
    """Put ``(T, G, width)`` tokens into a buffer ``(S, G, C, width)``, a larger one if those held do not suffice."""
    count, columns = places.positions.shape
    buffer = held
    if held is None or held.shape[2] < columns:
        buffer = new.new_zeros(count, new.shape[1], columns, new.shape[2])
        if held is not None:
            buffer[:, :, : held.shape[2]] = held
    assert buffer is not None
    buffer[places.texts, :, places.columns] = new if places.rows is None else new[places.rows]
    return buffer


def _concatenated(one: Tensor, other: Tensor) -> Tensor:
    """Buffers ``(S, G, C, width)`` of different texts as one, of as many columns as the longer has."""
    columns = max(one.shape[2], other.shape[2])
    return torch.cat([torch.nn.functional.pad(held, (0, 0, 0, columns - held.shape[2])) for held in (one, other)])


def _positions(lengths: Tensor, columns: int) -> Tensor:
    """``(S, columns)`` place in its text of the newest token of each column, negative if there has been none."""
    last = lengths[:, None] - 1
    return last - (last - torch.arange(columns, device=lengths.device)) % columns


def _new_positions(documents: Documents) -> Tensor:
    """``(S, L)`` places in their texts of continued texts' new tokens, flush at the right."""
    assert documents.past is not None  # only continued texts come here
    longest = max(documents.lengths)
    lengths = documents.past + documents.cu_seqlens.diff()
    return lengths[:, None] - longest + torch.arange(longest, device=lengths.device)

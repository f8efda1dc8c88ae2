"""A cache whose buffers never change their size or address, for steps of generation that a CUDA graph replays."""

from __future__ import annotations

from copy import copy

import torch
from torch import Tensor

from .cache import HymbaCache
from .configuration_hymba import HymbaConfig
from .documents import Documents


class FixedCache(HymbaCache):
    """A `HymbaCache` of a fixed number of slots, each for a text up to a fixed length.

    Texts are in the first slots. They join by being written into free slots and leave by others being moved into
    theirs, and a step changes the buffers in place: nothing is allocated, and nothing is counted on the CPU.

    Args:
        config: The configuration of the model.
        like: A cache of the model, after at least one pass.
        slots: The number of slots.
        length: The largest number of tokens of a text.

    Attributes:
        slots: The number of slots.
        length: The largest number of tokens of a text.
        count: The number of texts.
    """

    def __init__(self, config: HymbaConfig, like: HymbaCache, slots: int, length: int) -> None:
        super().__init__(config)
        assert like.lengths is not None
        self.slots = slots
        self.length = length
        self.count = 0
        self.meta = dict(like.meta)
        self.lengths = like.lengths.new_zeros(slots)
        for own, others in ((self.keys, like.keys), (self.values, like.values)):
            for layer, buffer in others.items():
                columns = min(length, self._limits.get(layer, length))
                own[layer] = buffer.new_zeros(slots, buffer.shape[1], columns, buffer.shape[3])
        for own, others in ((self.tails, like.tails), (self.states, like.states)):
            own.update({layer: x.new_zeros(slots, *x.shape[1:]) for layer, x in others.items()})

    def first(self, slots: int) -> FixedCache:
        """Return a view of the first slots, through which a step of their texts changes this cache."""
        view = copy(self)
        view._forget_pass()
        view.slots = slots
        assert self.lengths is not None
        view.lengths = self.lengths[:slots]
        for name in ("keys", "values", "tails", "states"):
            setattr(view, name, {layer: x[:slots] for layer, x in getattr(self, name).items()})
        return view

    def extend(self, layer: int, key: Tensor, value: Tensor, documents: Documents) -> None:
        """Store the keys ``(S, G, a)`` and values ``(S, G, v)`` of one new token of each text in place.

        Raises:
            ValueError: If a text has several new tokens.
        """
        if not documents.has_one_token_each:
            raise ValueError(
                "a cache of fixed size takes one new token of each text; prompts need a cache of their own"
            )
        super().extend(layer, key, value, documents)

    def store_ssm(self, layer: int, tails: Tensor, states: Tensor) -> None:
        """Replace the last inputs of the convolution and the SSM states in place."""
        self.tails[layer].copy_(tails)
        self.states[layer].copy_(states)

    def advance(self, documents: Documents) -> None:  # noqa: ARG002 (one new token of each text)
        """Count the new tokens in place, on the device."""
        assert self.lengths is not None
        self.lengths.add_(1)
        self._forget_pass()

    def join(self, other: HymbaCache) -> None:
        """Write the texts of another cache into free slots.

        Args:
            other: A cache of the same model, after at least one pass.

        Raises:
            ValueError: If the other cache is empty, or there are not enough free slots.
        """
        if other.lengths is None:
            raise ValueError("an empty cache cannot be joined; run a forward pass with it first")
        texts = other.count if isinstance(other, FixedCache) else len(other.lengths)
        if self.count + texts > self.slots:
            raise ValueError(f"{texts} texts cannot join {self.count} others in {self.slots} slots")
        assert self.lengths is not None
        free = slice(self.count, self.count + texts)
        for own, others in zip(self._by_text, other._by_text, strict=True):
            for layer, buffer in own.items():
                # What another text has left would reach this one where it is not finite, although no token sees it.
                buffer[free].zero_()
                _overlap(buffer[free], others[layer][:texts])
        self.lengths[free] = other.lengths[:texts]
        self.count += texts

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the texts of these slots only, in this order; only those that change their slot are copied."""
        assert self.lengths is not None
        places = torch.arange(len(indices), device=indices.device)
        moves = indices != places
        self.count = len(indices)
        if not moves.any():
            return
        places, sources = (x[moves].to(self.lengths.device) for x in (places, indices))
        for buffer in (self.lengths, *(x for tensors in self._by_text for x in tensors.values())):
            buffer[places] = buffer[sources]

    def _columns_for(self, layer: int, longest: int) -> int:  # noqa: ARG002 (the buffers never grow)
        return self.keys[layer].shape[2]


def _overlap(buffer: Tensor, other: Tensor) -> None:
    """Write a buffer into another that may have more or fewer columns, in which its tokens keep theirs."""
    if buffer.ndim == 4:
        columns = min(buffer.shape[2], other.shape[2])
        buffer, other = buffer[:, :, :columns], other[:, :, :columns]
    buffer.copy_(other)

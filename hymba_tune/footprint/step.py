"""The memory of a training step: its parts, at the worst of its moments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import accumulate
from types import MappingProxyType
from typing import Any

import torch

from hymba_tune.footprint.costs import LayerCost, LossCost, layer_cost, loss_cost
from hymba_tune.footprint.shapes import without_memory

MOMENT_BYTES = {
    "adamw": 8.0,
    "paged-adamw": 8.0,
    "adamw8bit": 2.1,
    "paged-adamw8bit": 2.1,
    "lion": 4.0,
    "lion8bit": 1.1,
    "adafactor": 0.1,
    "sgd": 0.0,
}
"""Bytes that each optimizer keeps of a parameter; those in 8 bits have a scale for every block beside them."""
SHORT = 64
"""Tokens of the texts that layers are counted with: all but attention's scores grows with the batch's tokens alone."""
COUNTS = (1, 3)
"""Texts they are counted with, for the line through both."""
Kind = tuple[bool, bool]


@dataclass(frozen=True)
class Batch:
    """What is computed at a time.

    Attributes:
        tokens: Of all texts, padding not counted: it is taken out.
        longest: Of the longest text.
        learned: Tokens that carry loss.
        places: Tokens with padding.
    """

    tokens: int
    longest: int
    learned: int
    places: int

    @classmethod
    def full(cls, rows: int, length: int) -> Batch:
        """Rows that are all as long as they may be, and learned to the last token."""
        return cls(rows * length, length, rows * length, rows * length)


@dataclass(frozen=True)
class Footprint:
    """Bytes of a training step, by part, at its worst moment.

    Attributes:
        weights: Of the model.
        adapter: What is trained beside it.
        gradients: Those that are there at that moment.
        optimizer: Its state.
        activations: What layers keep for the backward, and take while they compute.
        head: What the loss takes.
        extra_bytes: What is held beside the model: a teacher.
    """

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    head: int
    extra_bytes: int = 0

    @property
    def total(self) -> int:
        """Of all parts."""
        return sum(getattr(self, field.name) for field in fields(self))


class StepMemory:
    """Foresees the memory of a model's training steps.

    Args:
        model: A Hymba model with or without an adapter, on any device; the meta device will do.
        dtype: What is computed in.
        own_kernels: Whether the ways to compute are those chosen for this process; see `without_memory`.
    """

    def __init__(self, model: Any, *, dtype: torch.dtype, own_kernels: bool) -> None:
        self._model = model
        self._base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._mode = dtype, own_kernels
        self._counted: dict[tuple[int, int, int], LayerCost] = {}

    def of(
        self,
        batch: Batch,
        *,
        checkpointing: bool,
        accumulates: bool,
        optimizer: str,
        logit_copies: int = 0,
        quantized: Mapping[str, int] = MappingProxyType({}),
    ) -> Footprint:
        """The worst moment of a step.

        Args:
            batch: What it trains on at a time.
            checkpointing: Whether layers compute their activations again in the backward.
            accumulates: Whether gradients of earlier batches are there while one is computed.
            optimizer: Its name in the settings.
            logit_copies: The float32 copies of the logits of all places that the loss holds; 0 if it works in chunks.
            quantized: Bytes of each layer whose weight is stored in fewer bits, by its name.
        """
        layers, loss = self._layers(batch), self._loss(max(1, batch.learned))
        frozen, unpacked = self._frozen(quantized)
        trained = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        trained_bytes = sum(parameter.nbytes for parameter in trained)
        state = round(sum(parameter.numel() for parameter in trained) * MOMENT_BYTES[optimizer])
        waiting = trained_bytes if accumulates else 0
        around = self._around_layers(batch)
        whole_logits = 4 * logit_copies * batch.places * self._base.lm_head.weight.shape[0]
        moments = [
            (waiting, around + sum(cost.held(checkpointing) for cost in layers), max(loss.peak, whole_logits)),
            (trained_bytes, 0, 0),  # the optimizer's step
            (trained_bytes, around, loss.gradients),  # the embedding's backward, with a gradient of its own
        ]
        # The backward comes from the last layer: those before it still hold all they keep, those after it nothing.
        made = loss.gradients
        held = list(accumulate((cost.held(checkpointing) for cost in layers), initial=around))
        for cost, earlier in reversed(list(zip(layers, held[:-1], strict=True))):
            moments.append((waiting or made, earlier + cost.kept + max(cost.forward, cost.backward) + unpacked, 0))
            made += cost.gradients
        gradients, activations, head = max(moments, key=sum)
        weights, adapter = (frozen, trained_bytes) if frozen else (trained_bytes, 0)
        return Footprint(weights, adapter, gradients, state, activations, head)

    def _frozen(self, quantized: Mapping[str, int]) -> tuple[int, int]:
        """Bytes of what is not trained, and those that a weight in fewer bits takes while it is computed with."""
        held = unpacked = 0
        for name, parameter in self._base.named_parameters():
            if parameter.requires_grad:
                continue
            size = quantized.get(name.replace(".base_layer", "").removesuffix(".weight"))
            held += parameter.nbytes if size is None else size
            if size is not None:
                unpacked = max(unpacked, parameter.numel() * self._mode[0].itemsize)
        return held, unpacked

    def _around_layers(self, batch: Batch) -> int:
        """What is held before and behind the layers: embeddings, alone and behind meta tokens, and the final norm's.

        Where there is padding, also the final states with it, and without it again.
        """
        rows = self._base.config.num_memory_tokens + 3 * batch.tokens
        padded = batch.places + batch.tokens if batch.places > batch.tokens else 0
        embedding = self._base.base_model.embed_tokens.weight
        return int((rows + padded) * embedding.shape[1] * embedding.itemsize)

    @cached_property
    def _kinds(self) -> list[Kind]:
        """For each layer whether it sees whole texts, and whether it makes keys: those alike take the same."""
        config = self._base.config
        return [
            (config.is_global(index), config.kv_source(index) == index) for index in range(config.num_hidden_layers)
        ]

    def _layers(self, batch: Batch) -> list[LayerCost]:
        """What each layer takes."""
        meta = self._base.config.num_memory_tokens
        costs: dict[Kind, LayerCost] = {}
        for kind in dict.fromkeys(self._kinds):
            costs[kind] = self._on_line(kind, meta + batch.tokens)
            if kind[0] and batch.longest > SHORT:
                # A query of a global layer sees all of its text, and its scores take more than the line foretells.
                long = self._count(self._kinds.index(kind), 1, batch.longest)
                line, texts = self._on_line(kind, meta + batch.longest), batch.tokens / batch.longest
                costs[kind] = costs[kind].with_long_texts(long, line, texts)
        return [costs[kind] for kind in self._kinds]

    def _on_line(self, kind: Kind, rows: int) -> LayerCost:
        # On texts so short windows change nothing, so one layer stands for all that make keys, or for all that do not.
        index = next(index for index, (_, makes_keys) in enumerate(self._kinds) if makes_keys == kind[1])
        few, more = (self._count(index, texts, SHORT) for texts in COUNTS)
        first, second = (self._base.config.num_memory_tokens + texts * SHORT for texts in COUNTS)
        return few.on_line(first, more, second, rows)

    def _count(self, index: int, texts: int, length: int) -> LayerCost:
        key = index, texts, length
        if key not in self._counted:
            dtype, own_kernels = self._mode
            with without_memory(dtype, own_kernels=own_kernels):
                self._counted[key] = layer_cost(self._base.base_model, index, texts, length)
        return self._counted[key]

    def _loss(self, learned: int) -> LossCost:
        dtype, own_kernels = self._mode
        with without_memory(dtype, own_kernels=own_kernels):
            return loss_cost(self._base.lm_head.weight, learned)

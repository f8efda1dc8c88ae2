"""The memory of a training step at its peak, by part."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import accumulate
from types import MappingProxyType
from typing import Any

import torch

from hymba_tune.footprint.costs import LayerCost, LossCost, cache_bytes, layer_cost, loss_cost
from hymba_tune.footprint.shapes import without_memory
from hymba_tune.footprint.shares import ModelWeights, Sharding, Weights, held_by_each
from hymba_tune.generate.batches import CHOICE_BYTES

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
"""Bytes of optimizer state for each parameter; 8-bit states also have a scale for every block."""
SHORT = 64
"""Tokens of the texts that layers are counted with: all but attention scores depend only on the batch's tokens."""
COUNTS = (1, 3)
"""The two numbers of texts that layers are counted with, for linear interpolation."""
ONE_PROCESS = Sharding()
LAYER = re.compile(r"\blayers\.\d+\.")
"""The part of a parameter's name that says which decoder layer it belongs to."""
LayerKind = tuple[bool, bool]


@dataclass(frozen=True)
class Batch:
    """The size of a batch.

    Attributes:
        tokens: The tokens of all texts, without padding, which the model removes.
        longest: The tokens of the longest text.
        learned: The tokens with loss.
        places: The tokens with padding.
    """

    tokens: int
    longest: int
    learned: int
    places: int

    @classmethod
    def full(cls, rows: int, length: int) -> Batch:
        """Return a batch of rows that all have the maximum length, with loss on every token."""
        return cls(rows * length, length, rows * length, rows * length)


@dataclass(frozen=True)
class Footprint:
    """The bytes of a training step at its peak, by part; with several processes those of one of them.

    Attributes:
        weights: The model's weights.
        adapter: The adapter's weights.
        gradients: The gradients that exist at the peak.
        optimizer: The optimizer's state.
        activations: The tensors that layers keep for the backward, and those of the layer that computes.
        head: The tensors of the loss.
        extra_bytes: Models held in addition, such as a teacher.
        gathered: Weights of other processes, gathered to compute.
        buckets: Buffers for the communication of gradients.
        offloaded: Bytes in CPU memory instead of the device's; not in the total.
    """

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    head: int
    extra_bytes: int = 0
    gathered: int = 0
    buckets: int = 0
    offloaded: int = 0

    @property
    def total(self) -> int:
        """The bytes of all parts on the device."""
        everything: int = sum(getattr(self, field.name) for field in fields(self))
        return everything - self.offloaded


class StepMemory:
    """Estimates the memory of a model's training steps.

    Args:
        model: A Hymba model with or without an adapter, on any device; the meta device will do.
        dtype: The dtype of the computation.
        own_kernels: Whether to use the kernels chosen for this process; see `without_memory`.

    Attributes:
        model: The model.
        dtype: The dtype of the computation.
        own_kernels: Whether the kernels are those of this process.
    """

    def __init__(self, model: Any, *, dtype: torch.dtype, own_kernels: bool) -> None:
        self.model = model
        self.dtype = dtype
        self.own_kernels = own_kernels
        self._base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._counted: dict[tuple[int, int, int], LayerCost] = {}

    def of(
        self,
        batch: Batch,
        *,
        checkpointing: bool,
        accumulates: bool,
        optimizer: str,
        logit_copies: int = 0,
        rollouts: tuple[int, int] | None = None,
        quantized: Mapping[str, int] = MappingProxyType({}),
        sharding: Sharding = ONE_PROCESS,
    ) -> Footprint:
        """Estimate the bytes of a step at its peak.

        Args:
            batch: The size of its batch.
            checkpointing: Whether layers recompute their activations in the backward.
            accumulates: Whether gradients of earlier batches exist while a batch is computed.
            optimizer: The optimizer's name in the settings.
            logit_copies: The float32 copies of the whole batch's logits that the loss holds; 0 if it works in chunks.
            rollouts: The number of texts that are generated together before a step, and their tokens; None for none.
            quantized: The bytes of each quantized layer, by its name.
            sharding: How several processes share the model; the batch is that of one of them.
        """
        layers = self._layers(batch)
        loss = self._loss(max(1, batch.learned))
        weights, unpacked = self.weights(quantized)
        held = held_by_each(weights, sharding, moment_bytes=MOMENT_BYTES[optimizer], accumulates=accumulates)
        tied = loss.gradients  # of the head, to which the embedding's backward adds at the end
        around = self._around_layers(batch)
        whole_logits = 4 * logit_copies * batch.places * self._base.config.vocab_size

        # Each moment: gradients, activations, head.
        moments = [
            (held.waiting, around + sum(cost.held(checkpointing) for cost in layers), max(loss.peak, whole_logits)),
            (held.stepping, 0, 0),  # the optimizer's step
            (held.gradients(weights.whole.trained, tied), around, tied),  # the embedding's backward, a second gradient
        ]
        if rollouts is not None:  # nothing else is computed meanwhile
            moments.append((0, self._rollouts(*rollouts) + unpacked, 0))
        # The backward starts at the last layer: earlier layers still hold what they keep, later ones nothing.
        created = tied
        stored = list(accumulate((cost.held(checkpointing) for cost in layers), initial=around))
        for cost, earlier in reversed(list(zip(layers, stored[:-1], strict=True))):
            computing = earlier + cost.kept + max(cost.forward, cost.backward) + unpacked
            moments.append((held.gradients(created, tied), computing, 0))
            created += cost.gradients

        gradients, activations, head = max(moments, key=sum)
        base, adapter = (held.frozen, held.trained) if held.frozen else (held.trained, 0)
        return Footprint(
            base,
            adapter,
            gradients,
            held.optimizer,
            activations,
            head,
            gathered=held.gathered,
            buckets=held.buckets,
            offloaded=held.offloaded,
        )

    def _rollouts(self, texts: int, length: int) -> int:
        """Return the bytes of the cache of texts that are generated together, and of their logits and probabilities."""
        config, weight = self._base.config, self._base.lm_head.weight
        return cache_bytes(config, texts, length, self.dtype.itemsize) + CHOICE_BYTES * texts * int(weight.shape[0])

    def weights(self, quantized: Mapping[str, int] = MappingProxyType({})) -> tuple[ModelWeights, int]:
        """Return the model's weights, and the bytes of the largest quantized weight once it is dequantized.

        Args:
            quantized: The bytes of each quantized layer, by its name.
        """
        parts: dict[str, Weights] = defaultdict(Weights)
        unpacked = 0
        for name, parameter in self._base.named_parameters():
            layer = LAYER.search(name)
            part = layer[0] if layer else ""
            if parameter.requires_grad:
                parts[part] += Weights(0, parameter.nbytes, parameter.numel(), parameter.numel())
                continue
            size = quantized.get(name.replace(".base_layer", "").removesuffix(".weight"))
            parts[part] += Weights(parameter.nbytes if size is None else size, parameters=parameter.numel())
            if size is not None:
                unpacked = max(unpacked, parameter.numel() * self.dtype.itemsize)
        around = parts.pop("", Weights())
        return ModelWeights(list(parts.values()), around), unpacked

    def _around_layers(self, batch: Batch) -> int:
        """Return the bytes of embeddings, with and without meta tokens, and of the final norm's output.

        Where there is padding, the final states with and without it are added.
        """
        rows = self._base.config.num_memory_tokens + 3 * batch.tokens
        padded = batch.places + batch.tokens if batch.places > batch.tokens else 0
        embedding = self._base.base_model.embed_tokens.weight
        return int((rows + padded) * embedding.shape[1] * embedding.itemsize)

    @cached_property
    def _kinds(self) -> list[LayerKind]:
        """For each layer whether its attention is global, and whether it computes keys: equal kinds cost the same."""
        config = self._base.config
        return [
            (config.is_global(index), config.kv_source(index) == index) for index in range(config.num_hidden_layers)
        ]

    def _layers(self, batch: Batch) -> list[LayerCost]:
        """Return the cost of each layer."""
        meta = self._base.config.num_memory_tokens
        costs: dict[LayerKind, LayerCost] = {}
        for kind in dict.fromkeys(self._kinds):
            costs[kind] = self._on_line(kind, meta + batch.tokens)
            if kind[0] and batch.longest > SHORT:
                # In a global layer scores grow with the square of the length, which the linear estimate misses.
                long = self._count(self._kinds.index(kind), 1, batch.longest)
                line = self._on_line(kind, meta + batch.longest)
                texts = batch.tokens / batch.longest
                costs[kind] = costs[kind].with_long_texts(long, line, texts)
        return [costs[kind] for kind in self._kinds]

    def _on_line(self, kind: LayerKind, rows: int) -> LayerCost:
        # On such short texts windows change nothing, so layers differ only in whether they compute keys.
        index = next(index for index, (_, makes_keys) in enumerate(self._kinds) if makes_keys == kind[1])
        few, more = (self._count(index, texts, SHORT) for texts in COUNTS)
        first, second = (self._base.config.num_memory_tokens + texts * SHORT for texts in COUNTS)
        return few.on_line(first, more, second, rows)

    def _count(self, index: int, texts: int, length: int) -> LayerCost:
        key = index, texts, length
        if key not in self._counted:
            with without_memory(self.dtype, own_kernels=self.own_kernels):
                self._counted[key] = layer_cost(self._base.base_model, index, texts, length)
        return self._counted[key]

    def _loss(self, learned: int) -> LossCost:
        if not hasattr(self._base, "lm_head"):
            return LossCost(0, 0)  # one score of each text
        weight = self._base.lm_head.weight  # outside of the block, as PEFT computes it if rows of it are trained
        with without_memory(self.dtype, own_kernels=self.own_kernels):
            return loss_cost(weight, learned)

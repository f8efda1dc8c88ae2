"""The memory of a training step: its parts, at the worst of its moments."""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from hymba_tune.footprint.costs import LayerCost, layer_costs, loss_cost
from hymba_tune.footprint.shapes import without_memory


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
    """

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    head: int

    @property
    def total(self) -> int:
        """Of all parts."""
        return sum(getattr(self, field.name) for field in fields(self))


def predict(
    model: Any,
    batch: Batch,
    *,
    dtype: torch.dtype,
    checkpointing: bool,
    accumulates: bool,
    optimizer: str,
    own_kernels: bool,
) -> Footprint:
    """Foresee the memory of a training step.

    Args:
        model: A Hymba model with or without an adapter, on any device; the meta device will do.
        batch: What it trains on at a time.
        dtype: What is computed in.
        checkpointing: Whether layers compute their activations again in the backward.
        accumulates: Whether gradients of earlier batches are there while one is computed.
        optimizer: Its name in the settings.
        own_kernels: Whether the ways to compute are those chosen for this process; see `without_memory`.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = base.lm_head.weight
    with without_memory(dtype, own_kernels=own_kernels):
        layers = layer_costs(base.base_model, batch.tokens, batch.longest)
        loss = loss_cost(head, max(1, batch.learned), head.dtype)
    weights, adapter, trained = _parameter_bytes(model)
    state, waiting = optimizer_bytes(model, optimizer), trained if accumulates else 0
    before = _around_layers(base, batch)
    moments = [
        (waiting, before + sum(cost.held(checkpointing) for cost in layers), loss.peak),
        (trained, 0, 0),  # the optimiser's step
        (trained, before, loss.gradients),  # the embedding's backward, with a gradient of its own
    ]
    # The backward comes from the last layer: the ones before it still hold all they keep, those after it nothing.
    made = loss.gradients
    held = list(accumulate((cost.held(checkpointing) for cost in layers), initial=before))
    for cost, earlier in reversed(list(zip(layers, held[:-1], strict=True))):
        worst = cost.kept + max(cost.forward, cost.backward)
        moments.append((waiting or made, earlier + worst, 0))
        made += cost.gradients
    gradients, activations, of_loss = max(moments, key=sum)
    return Footprint(weights, adapter, gradients, state, activations, of_loss)


def _around_layers(base: Any, batch: Batch) -> int:
    """What is held before and behind the layers: embeddings, alone and behind the meta tokens, and the final norm's.

    Where there is padding, also the final states with it, and without it again.
    """
    rows = base.config.num_memory_tokens + 3 * batch.tokens
    padded = batch.places + batch.tokens if batch.places > batch.tokens else 0
    return (rows + padded) * int(base.config.hidden_size) * base.base_model.embed_tokens.weight.itemsize


def _parameter_bytes(model: nn.Module) -> tuple[int, int, int]:
    """Of the model, of what an adapter adds to it, and of all that is trained."""
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    frozen = sum(parameter.nbytes for parameter in model.parameters() if not parameter.requires_grad)
    return (frozen, trained, trained) if frozen else (trained, 0, trained)


def optimizer_bytes(model: nn.Module, name: str) -> int:
    """Of an optimiser's state: two moments of each weight that is trained.

    Args:
        model: Whose trainable parameters are optimised.
        name: As settings call it; one with 8 bits keeps moments of a byte each, and their scales.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return sum(2 * parameter.nbytes for parameter in trained)

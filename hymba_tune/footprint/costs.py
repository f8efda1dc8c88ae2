"""What each kind of layer, and the loss, keeps for the backward and takes while it computes.

Counted, not modelled: the model's own layers run forward and backward on tensors without memory, so that what is kept
is what the code keeps. Call these functions within `without_memory`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hymba_tune.footprint.shapes import LiveBytes, fake_parameters
from hymba_tune.model.documents import find_documents
from hymba_tune.model.loss import learned_cross_entropy
from hymba_tune.model.rotary import rotary_tables

SHORT = 256
"""Tokens of the texts that are counted with: all but attention's largest block grows with the tokens alone."""
COUNTS = (1, 3)
"""Texts that are counted with."""


@dataclass(frozen=True)
class LayerCost:
    """Bytes that a layer takes.

    Attributes:
        kept: From its forward to its backward, what it hands on included.
        handed_on: What it hands on, which is all that is kept of a checkpointed layer.
        forward: Beyond ``kept``, at the worst moment of the forward.
        backward: Beyond ``kept``, at the worst moment of the backward, its own parameters' gradients included.
        gradients: Of its own parameters.
    """

    kept: int
    handed_on: int
    forward: int
    backward: int
    gradients: int

    def held(self, checkpointing: bool) -> int:
        """What is kept of it while other layers compute."""
        return self.handed_on if checkpointing else self.kept

    def at(self, rows: int, other: LayerCost, other_rows: int, wanted: int) -> LayerCost:
        """The cost of ``wanted`` rows, on the line through this one of ``rows`` and the other."""
        share = (wanted - rows) / (other_rows - rows)
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return LayerCost(*(max(0, round(mine + (theirs - mine) * share)) for mine, theirs in pairs))


def kinds_of(config: Any) -> list[tuple[bool, bool]]:
    """For each layer whether it sees whole texts, and whether it makes keys: layers of one kind take the same."""
    return [(config.is_global(layer), config.kv_source(layer) == layer) for layer in range(config.num_hidden_layers)]


def layer_costs(backbone: Any, tokens: int, longest: int) -> list[LayerCost]:
    """What each layer takes in a training step.

    Args:
        backbone: The layers' model, on any device: only shapes and number formats are looked at.
        tokens: Of all texts of a batch.
        longest: Of the longest text.
    """
    kinds, meta = kinds_of(backbone.config), backbone.config.num_memory_tokens
    rows = [meta + count * SHORT for count in COUNTS]
    costs: dict[tuple[bool, bool], LayerCost] = {}
    for kind in dict.fromkeys(kinds):
        layer = kinds.index(kind)
        few, more = (layer_cost(backbone, layer, count, SHORT) for count in COUNTS)
        cost = few.at(rows[0], more, rows[1], meta + tokens)
        if kind[0] and longest > SHORT:
            # A query of a global layer sees all of its text: what its scores take beyond the line above.
            long, line = layer_cost(backbone, layer, 1, longest), few.at(rows[0], more, rows[1], meta + longest)
            pairs = zip(vars(cost).values(), vars(long).values(), vars(line).values(), strict=True)
            cost = LayerCost(*(own + max(0, true - straight) for own, true, straight in pairs))
        costs[kind] = cost
    return [costs[kind] for kind in kinds]


def layer_cost(backbone: Any, index: int, texts: int, length: int) -> LayerCost:
    """What one layer takes for so many texts of one length."""
    config, layer = backbone.config, backbone.layers[index]
    dtype = backbone.embed_tokens.weight.dtype
    documents = find_documents((texts, length), torch.device("cpu"), num_meta=config.num_memory_tokens)
    rows = len(documents.positions)
    tables = rotary_tables(documents.positions, config.rope_theta, config.head_dim, dtype) if config.rope else None
    parameters = fake_parameters(layer)
    hidden = torch.empty(rows, config.hidden_size, dtype=dtype, requires_grad=True)
    key, value = (None, None) if config.kv_source(index) == index else _keys_and_values(config, rows, layer)
    with LiveBytes() as bytes_:
        outputs = functional_call(layer, parameters, (hidden, key, value, documents, tables, None))
        kept, forward = bytes_.live, bytes_.peak
        handed_on = sum(made.nbytes for made, given in zip(outputs, (hidden, key, value), strict=True) if made is not given)
        gradient = torch.empty_like(outputs[0])
        bytes_.peak = bytes_.live
        outputs[0].backward(gradient)
    gradients = sum(parameter.grad.nbytes for parameter in parameters.values() if parameter.grad is not None)
    return LayerCost(kept, handed_on, forward - kept, bytes_.peak - kept, gradients)


def _keys_and_values(config: Any, rows: int, layer: nn.Module) -> tuple[Tensor, Tensor]:
    """What another layer hands to one that makes none, in the number format that it computes in."""
    weight = next(layer.parameters())
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype
    widths = config.head_dim, config.value_dim
    key, value = (
        torch.empty(rows, config.num_key_value_heads, width, dtype=dtype, requires_grad=True) for width in widths
    )
    return key, value


@dataclass(frozen=True)
class LossCost:
    """Bytes that the loss takes.

    Attributes:
        peak: At its worst moment, beyond the hidden states it is given.
        gradients: Of the head, which shares its weight with the embedding.
    """

    peak: int
    gradients: int


def loss_cost(weight: Tensor, tokens: int, dtype: torch.dtype) -> LossCost:
    """What the loss takes.

    Args:
        weight: The head's ``(V, d)``, on any device.
        tokens: That are learned.
        dtype: Of the hidden states.
    """
    head = torch.empty(weight.shape, dtype=weight.dtype, requires_grad=weight.requires_grad)
    hidden = torch.empty(tokens, weight.shape[1], dtype=dtype, requires_grad=True)
    targets = torch.empty(tokens, dtype=torch.int64)
    with LiveBytes() as bytes_:
        # A copy, as is made of the learned tokens' hidden states.
        learned_cross_entropy(hidden.clone(), head, targets).backward()
    return LossCost(bytes_.peak, 0 if head.grad is None else head.grad.nbytes)

"""What each kind of layer, and the loss, keeps for the backward and takes while it computes.

Counted, not modelled: the model's own layers run forward and backward on tensors without memory, so that what is kept
is what the code keeps. Call these functions within `without_memory`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from hymba_tune.footprint.shapes import LiveBytes, fake_parameters
from hymba_tune.model.documents import find_documents
from hymba_tune.model.loss import learned_cross_entropy
from hymba_tune.model.rotary import rotary_tables


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

    def on_line(self, rows: int, other: LayerCost, other_rows: int, wanted: int) -> LayerCost:
        """The cost of ``wanted`` rows, on the line through this one of ``rows`` and the other."""
        share = (wanted - rows) / (other_rows - rows)
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return LayerCost(*(max(0, round(mine + (theirs - mine) * share)) for mine, theirs in pairs))

    def with_long_texts(self, one: LayerCost, line: LayerCost, texts: float) -> LayerCost:
        """This cost, foretold by a line, for texts so long that their scores count.

        Args:
            one: What one such text takes.
            line: What a line foretells of it.
            texts: How many there are; what is kept of each adds up, what is taken for a while does not.
        """
        kept = self.kept + round(max(0, one.kept - line.kept) * texts)
        return replace(
            self, kept=kept, forward=max(self.forward, one.forward), backward=max(self.backward, one.backward)
        )


def layer_cost(backbone: Any, index: int, texts: int, length: int) -> LayerCost:
    """What one layer takes.

    Args:
        backbone: The layers' model, on any device: only shapes and number formats are looked at.
        index: Of the layer.
        texts: In a batch.
        length: Tokens of each.
    """
    config, layer = backbone.config, backbone.layers[index]
    dtype = backbone.embed_tokens.weight.dtype
    documents = find_documents((texts, length), torch.device("cpu"), num_meta=config.num_memory_tokens)
    rows = len(documents.positions)
    tables = rotary_tables(documents.positions, config.rope_theta, config.head_dim, dtype) if config.rope else None
    parameters = fake_parameters(layer)
    hidden = torch.empty(rows, config.hidden_size, dtype=dtype, requires_grad=True)
    given = hidden, *((None, None) if config.kv_source(index) == index else _keys_and_values(config, rows, dtype))
    with LiveBytes() as memory:
        made = functional_call(layer, parameters, (*given, documents, tables, None))
        kept, forward = memory.live, memory.peak
        handed_on = sum(output.nbytes for output, taken in zip(made, given, strict=True) if output is not taken)
        gradient = torch.empty_like(made[0])
        memory.peak = memory.live
        made[0].backward(gradient)
    gradients = sum(parameter.grad.nbytes for parameter in parameters.values() if parameter.grad is not None)
    return LayerCost(kept, handed_on, forward - kept, memory.peak - kept, gradients)


def _keys_and_values(config: Any, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What another layer hands to one that makes none, in the number format that is computed in."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else dtype
    shape = rows, config.num_key_value_heads
    key, value = (
        torch.empty(*shape, width, dtype=dtype, requires_grad=True) for width in (config.head_dim, config.value_dim)
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


def loss_cost(head: Tensor, learned: int) -> LossCost:
    """What the loss takes.

    Args:
        head: Its ``(V, d)`` weight, on any device.
        learned: Tokens that carry loss.
    """
    weight = torch.empty(head.shape, dtype=head.dtype, requires_grad=head.requires_grad)
    hidden = torch.empty(learned, head.shape[1], dtype=head.dtype, requires_grad=True)
    targets = torch.empty(learned, dtype=torch.int64)
    with LiveBytes() as memory:
        # The copy is that of the learned tokens' states.
        learned_cross_entropy(hidden.clone(), weight, targets).backward()
    return LossCost(memory.peak, 0 if weight.grad is None else weight.grad.nbytes)

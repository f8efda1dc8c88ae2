"""The memory of each kind of layer and of the loss: kept for the backward, and used during computation.

The bytes are counted, not modeled: the model's own layers run forward and backward on tensors without memory. Call
these functions within `without_memory`.
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
    """The bytes of a layer.

    Attributes:
        kept: Bytes from the layer's forward to its backward, including its outputs.
        handed_on: Bytes of its outputs, which are all that a checkpointed layer keeps.
        forward: Bytes beyond ``kept`` at the peak of the forward.
        backward: Bytes beyond ``kept`` at the peak of the backward, including the gradients of its parameters.
        gradients: Bytes of the gradients of its parameters.
    """

    kept: int
    handed_on: int
    forward: int
    backward: int
    gradients: int

    def held(self, checkpointing: bool) -> int:
        """Return the bytes kept while other layers compute."""
        return self.handed_on if checkpointing else self.kept

    def on_line(self, rows: int, other: LayerCost, other_rows: int, wanted: int) -> LayerCost:
        """Return the cost of ``wanted`` rows, linear between this cost of ``rows`` and the other of ``other_rows``."""
        share = (wanted - rows) / (other_rows - rows)
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return LayerCost(*(max(0, round(mine + (theirs - mine) * share)) for mine, theirs in pairs))

    def with_long_texts(self, one: LayerCost, line: LayerCost, texts: float) -> LayerCost:
        """Return this linear estimate corrected for texts so long that attention scores matter.

        Args:
            one: The counted cost of one such text.
            line: The linear estimate for one such text.
            texts: The number of texts. Kept bytes add up over texts; temporary bytes do not.
        """
        kept = self.kept + round(max(0, one.kept - line.kept) * texts)
        return replace(
            self, kept=kept, forward=max(self.forward, one.forward), backward=max(self.backward, one.backward)
        )


def layer_cost(backbone: Any, index: int, texts: int, length: int) -> LayerCost:
    """Count the bytes of one layer.

    Args:
        backbone: The model of the layers, on any device: only shapes and dtypes matter.
        index: The layer's index.
        texts: The number of texts in a batch.
        length: The tokens of each text.
    """
    layer, parameters, inputs, others = layer_inputs(backbone, index, texts, length)
    with LiveBytes() as memory:
        outputs = functional_call(layer, parameters, (*inputs, *others))
        kept, forward = memory.live, memory.peak
        handed_on = sum(new.nbytes for new, old in zip(outputs, inputs, strict=True) if new is not old)

        gradient = torch.empty_like(outputs[0])
        memory.peak = memory.live
        outputs[0].backward(gradient)
    gradients = sum(parameter.grad.nbytes for parameter in parameters.values() if parameter.grad is not None)
    return LayerCost(kept, handed_on, forward - kept, memory.peak - kept, gradients)


def layer_inputs(backbone: Any, index: int, texts: int, length: int) -> tuple[Any, dict[str, Tensor], Any, Any]:
    """Return a layer and the arguments of its forward, on tensors without memory.

    Args:
        backbone: The model of the layers.
        index: The layer's index.
        texts: The number of texts in a batch.
        length: The tokens of each text.

    Returns:
        The layer, its parameters, the inputs with gradients, and the other arguments.
    """
    config, layer = backbone.config, backbone.layers[index]
    dtype = backbone.final_layernorm.weight.dtype  # no adapter wraps it
    documents = find_documents((texts, length), torch.device("cpu"), num_meta=config.num_memory_tokens)
    rows = len(documents.positions)
    tables = rotary_tables(documents.positions, config.rope_theta, config.head_dim, dtype) if config.rope else None
    parameters = fake_parameters(layer)
    hidden = torch.empty(rows, config.hidden_size, dtype=dtype, requires_grad=True)
    inputs = hidden, *((None, None) if config.kv_source(index) == index else _keys_and_values(config, rows, dtype))
    return layer, parameters, inputs, (documents, tables, None)


def _keys_and_values(config: Any, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return keys and values as another layer provides them, in the dtype of the computation."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else dtype
    shape = rows, config.num_key_value_heads
    key, value = (
        torch.empty(*shape, width, dtype=dtype, requires_grad=True) for width in (config.head_dim, config.value_dim)
    )
    return key, value


@dataclass(frozen=True)
class LossCost:
    """The bytes of the loss.

    Attributes:
        peak: Bytes at its peak, beyond the hidden states that it receives.
        gradients: Bytes of the gradient of the head, which shares its weight with the embedding.
    """

    peak: int
    gradients: int


def loss_cost(head: Tensor, learned: int) -> LossCost:
    """Count the bytes of the loss.

    Args:
        head: The head's ``(V, d)`` weight, on any device.
        learned: The number of tokens with loss.
    """
    weight = torch.empty(head.shape, dtype=head.dtype, requires_grad=head.requires_grad)
    hidden = torch.empty(learned, head.shape[1], dtype=head.dtype, requires_grad=True)
    targets = torch.empty(learned, dtype=torch.int64)
    with LiveBytes() as memory:
        # The copy represents the selection of the learned tokens' states.
        learned_cross_entropy(hidden.clone(), weight, targets).backward()
    return LossCost(memory.peak, 0 if weight.grad is None else weight.grad.nbytes)


def cache_bytes(config: Any, texts: int, length: int, itemsize: int) -> int:
    """Return the bytes of the cache of texts that are generated together.

    Args:
        config: The model's configuration.
        texts: The number of texts.
        length: The tokens of each text, with its prompt.
        itemsize: The bytes of a number.
    """
    layers = range(config.num_hidden_layers)
    unbounded = {config.kv_source(layer) for layer in layers if config.is_global(layer)}
    columns = 0
    for layer in {config.kv_source(layer) for layer in layers}:
        bounded = config.sliding_window is not None and layer not in unbounded
        columns += min(length, config.sliding_window + 1) if bounded else length
    keys = columns * config.num_key_value_heads * (config.head_dim + config.value_dim) * itemsize
    inner = config.mamba_expand * config.hidden_size
    states = len(layers) * inner * (config.mamba_d_state * 4 + (config.mamba_d_conv - 1) * itemsize)
    return int(texts * (keys + states))

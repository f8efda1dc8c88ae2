"""The time of a training step and of a decoded token: a roofline of matrix products, bytes and kernel launches.

A device computes one kernel after the other: a matrix product takes as long as its operations or its bytes, whichever
is longer, and everything else as long as its bytes. Meanwhile the host launches kernels, and is waited for if it is
slower. The work is counted, not modeled: the model's own layers run forward and backward on tensors without memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hymba_tune.footprint.costs import layer_inputs
from hymba_tune.footprint.shapes import without_memory
from hymba_tune.footprint.step import MOMENT_BYTES, Batch
from hymba_tune.model.loss import learned_cross_entropy

READS = 2
"""The bytes that a kernel of our own reads, over those that it writes; only its results are seen (norms, gates and the
convolution read 1 to 2 times as many, the scan and attention 1 to 4)."""
DECODING_LAUNCHES = 12
"""The kernels that a layer launches for a new token of each text: the budget that the tests hold."""
LEARNED = 2048
"""The tokens with loss that are counted; more take as much each."""


@dataclass(frozen=True)
class Speeds:
    """What a device reaches.

    Attributes:
        operations: Floating-point operations a second in large matrix products.
        bytes: Bytes a second, read and written, of large tensors.
        launch: The host's seconds for a kernel.
        overlap: Whether the host launches kernels while the device computes others.
    """

    operations: float
    bytes: float
    launch: float
    overlap: bool = True


@dataclass(frozen=True)
class Work:
    """What some computation asks of a device.

    Attributes:
        products: The operations and the bytes of each matrix product.
        bytes: The bytes that everything else reads and writes.
        launches: The number of kernels.
    """

    products: tuple[tuple[float, float], ...] = ()
    bytes: float = 0.0
    launches: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.products + other.products, self.bytes + other.bytes, self.launches + other.launches)

    def __mul__(self, size: float) -> Work:
        """Return the work on ``size`` times as many tokens, by as many kernels."""
        return Work(self._scaled(size), self.bytes * size, self.launches)

    def repeated(self, times: int) -> Work:
        """Return the work of as many computations one after the other."""
        return Work(self._scaled(times), self.bytes * times, self.launches * times)

    def _scaled(self, size: float) -> tuple[tuple[float, float], ...]:
        return tuple((operations * size, moved * size) for operations, moved in self.products)

    def seconds(self, speeds: Speeds) -> float:
        """Return the time on a device."""
        products = sum(max(operations / speeds.operations, moved / speeds.bytes) for operations, moved in self.products)
        device, host = products + self.bytes / speeds.bytes, self.launches * speeds.launch
        return max(device, host) if speeds.overlap else device + host


class Counting(TorchDispatchMode):
    """Counts the work of all operations while it is active.

    Attributes:
        work: The work so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self._products: list[tuple[float, float]] = []
        self._bytes = 0.0
        self._launches = 0

    @property
    def work(self) -> Work:
        """The work so far."""
        return Work(tuple(self._products), self._bytes, self._launches)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        results = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        inputs, outputs = (
            [x for x in tree_leaves(part) if isinstance(x, Tensor)] for part in ((args, kwargs), results)
        )
        if func.namespace == "prim" or not outputs or _is_view(inputs, outputs, name):
            return results

        written = sum(x.nbytes for x in outputs)
        moved = written + sum(x.nbytes for x in inputs)
        if name.rstrip("_") in ("mm", "addmm"):
            # An addmm has its own matrix first.
            self._products.append((2.0 * prod(outputs[0].shape) * inputs[-1].shape[0], moved))
        elif "empty" in name:  # what a kernel of our own, which is not seen, will write
            moved = (1 + READS) * written
            self._bytes += moved
        else:
            self._bytes += moved
        self._launches += 1
        return results


def _is_view(inputs: list[Tensor], outputs: list[Tensor], name: str) -> bool:
    """Return whether an operation only looks at its inputs in another way; one that changes them does more."""
    storages = {x.untyped_storage()._cdata for x in inputs}
    return not name.endswith("_") and all(x.untyped_storage()._cdata in storages for x in outputs)


def layer_work(backbone: Any, index: int, texts: int, length: int) -> tuple[Work, Work]:
    """Count the work of the forward and of the backward of a layer; call it in `without_memory`.

    Args:
        backbone: The model of the layers, on any device: only shapes and dtypes matter.
        index: The layer's index.
        texts: The number of texts in a batch.
        length: The tokens of each text.
    """
    config = backbone.config
    layer, parameters, inputs, others = layer_inputs(backbone, index, texts, length)
    with torch.no_grad():  # what all layers share, such as the borders of texts, is not counted
        functional_call(layer, parameters, (*inputs, *others))
    with Counting() as forward:
        outputs = functional_call(layer, parameters, (*inputs, *others))
    gradient = torch.empty_like(outputs[0])
    with Counting() as backward:
        outputs[0].backward(gradient)

    window = None if config.is_global(index) else config.sliding_window
    pairs = texts * visible_pairs(length, config.num_memory_tokens, window)
    heads, width, value_width = config.num_attention_heads, config.head_dim, config.value_dim
    attention, attention_backward = (
        Work(((2.0 * heads * pairs * widths, 0.0),)) for widths in (width + value_width, 3 * width + 2 * value_width)
    )
    return forward.work + attention, backward.work + attention_backward


def visible_pairs(tokens: int, meta: int, window: int | None) -> int:
    """Return the pairs of a query in a text and a key that it sees, as `packed_attention` has them."""
    reach = tokens if window is None else min(window + 1, tokens)
    return tokens * meta + reach * (reach + 1) // 2 + (tokens - reach) * reach


def loss_work(head: Tensor, learned: int) -> Work:
    """Count the work of the loss, forward and backward; call it in `without_memory`.

    Args:
        head: The head's ``(V, d)`` weight, on any device.
        learned: The number of tokens with loss.
    """
    counted = min(learned, LEARNED)
    weight = torch.empty(head.shape, dtype=head.dtype, requires_grad=head.requires_grad)
    hidden = torch.empty(counted, head.shape[1], dtype=head.dtype, requires_grad=True)
    targets = torch.empty(counted, dtype=torch.int64)
    with Counting() as counting:
        learned_cross_entropy(hidden, weight, targets).backward()
    work: Work = counting.work
    return work * (learned / counted)


def optimizer_work(trained: int, moment_bytes: float) -> Work:
    """Return the work of a fused optimizer's step.

    Args:
        trained: The number of trained parameters.
        moment_bytes: The bytes of the optimizer's state for each.
    """
    weight = gradient = torch.float32.itemsize
    return Work(bytes=trained * (2 * weight + gradient + 2 * moment_bytes))


def step_work(
    model: Any,
    batch: Batch,
    *,
    dtype: torch.dtype,
    own_kernels: bool,
    checkpointing: bool,
    optimizer: str,
    batches: int = 1,
    quantized: Mapping[str, int] = MappingProxyType({}),
) -> Work:
    """Count the work of a training batch, with its share of the optimizer's step.

    Args:
        model: A Hymba model with or without an adapter, on any device; the meta device will do.
        batch: The size of the batch.
        dtype: The dtype of the computation.
        own_kernels: Whether to use the kernels chosen for this process; see `without_memory`.
        checkpointing: Whether layers recompute their activations in the backward.
        optimizer: The optimizer's name in the settings.
        batches: The batches of a step (gradient accumulation).
        quantized: The bytes of each quantized layer, by its name.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = base.config
    head = base.lm_head.weight if hasattr(base, "lm_head") else None  # here, as PEFT computes it if rows are trained
    passes = (2, 1) if checkpointing else (1, 1)  # of the forward, of the backward
    texts = max(1, batch.tokens // batch.longest)
    # Layers that are alike take equally long.
    kinds = [(config.is_global(index), config.kv_source(index) == index) for index in range(config.num_hidden_layers)]
    with without_memory(dtype, own_kernels=own_kernels):
        work = Work() if head is None else loss_work(head, max(1, batch.learned))
        for kind in dict.fromkeys(kinds):
            parts = layer_work(base.base_model, kinds.index(kind), texts, batch.longest)
            for times, part in zip(passes, parts, strict=True):
                work += part.repeated(times * kinds.count(kind))
    trained = sum(parameter.numel() for parameter in base.parameters() if parameter.requires_grad)
    work += optimizer_work(trained, MOMENT_BYTES[optimizer]) * (1 / batches)
    return work + dequantizing_work(base, quantized, dtype.itemsize).repeated(sum(passes))


def dequantizing_work(base: nn.Module, quantized: Mapping[str, int], itemsize: int) -> Work:
    """Return the work of unpacking quantized weights once.

    Args:
        base: The model, whose adapter is within its layers.
        quantized: The bytes of each quantized layer, by its name.
        itemsize: The bytes of a number in the computation.
    """
    unpacked = sum(
        parameter.numel()
        for name, parameter in base.named_parameters()
        if name.replace(".base_layer", "").removesuffix(".weight") in quantized
    )
    return Work(bytes=sum(quantized.values()) + unpacked * itemsize, launches=len(quantized))


def token_work(weights: float, parameters: float, layers: int, texts: int, cache: float) -> Work:
    """Return the work of a token for each of several texts that are generated together.

    Args:
        weights: The bytes of the model's weights.
        parameters: The parameters of its linear layers.
        layers: The number of layers.
        texts: The number of texts.
        cache: The bytes of the cache of all texts.
    """
    return Work(((2.0 * parameters * texts, weights),), cache, layers * DECODING_LAUNCHES)

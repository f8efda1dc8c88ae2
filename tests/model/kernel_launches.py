"""One launch of every Triton kernel of the model at the released shape, for `compile_kernels`.

A file of kernels is registered here with a function that calls its operation, forward and backward, on tensors of the
released widths. The numbers of rows are small: sizes in time are not compiled into a kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from unittest.mock import patch

import torch
from torch import Tensor

from hymba_tune.model import attention_token_triton
from hymba_tune.model.attention_token_triton import triton_attend
from hymba_tune.model.convolution_triton import triton_conv1d, triton_packed_conv1d
from hymba_tune.model.documents import find_documents
from hymba_tune.model.elementwise_triton import (
    triton_add_rms_norm,
    triton_gated_silu,
    triton_mean_of_norms,
    triton_norm_rotate,
    triton_rms_norm,
    triton_rotate,
)
from hymba_tune.model.one_token_inputs import StateInputs, TokenInputs
from hymba_tune.model.one_token_triton import triton_gate_up, triton_prepare, triton_update
from hymba_tune.model.scan_inputs import ScanInputs
from hymba_tune.model.scan_triton import triton_scan
from hymba_tune.model.triton_kernels import summed_parts

CHANNELS, STATES, PROJECTED = 3200, 16, 8960
"""The channels of an SSM, the size of a channel's state, and the width of the input projection."""

LAUNCHES: dict[str, Callable[[], None]] = {}
"""By the name of a module in ``hymba_tune/model``, the function that launches all kernels in it."""


def launches(module: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Register a function that launches all kernels of a module."""

    def register(launch: Callable[[], None]) -> Callable[[], None]:
        LAUNCHES[module] = launch
        return launch

    return register


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return a leaf; the released model trains in bfloat16."""
    return torch.empty(shape, dtype=dtype, requires_grad=True)


@launches("scan_triton_kernels")
def scan() -> None:
    """Launch the scan as training does: behind meta tokens, with gates that are columns of the input projection."""
    rows = 256
    u, dt, B, C = (empty(rows, width) for width in (CHANNELS, CHANNELS, STATES, STATES))
    z = empty(rows, PROJECTED)[:, -CHANNELS:]
    A = empty(CHANNELS, STATES, dtype=torch.float32)
    inputs = ScanInputs(u, dt.float(), A, B, C, empty(CHANNELS), z, None, None, (0, 128, rows), fuses_meta_prefix=True)
    torch.cat([x.float().flatten() for x in triton_scan(inputs)]).sum().backward()


@launches("elementwise_kernels")
def elementwise() -> None:
    """Launch the norms, gates and rotations of a layer with trained weights."""
    rows = 256
    hidden, update, weight = empty(rows, 1600), empty(rows, 1600), empty(1600)
    projected = empty(rows, PROJECTED)
    cos, sin = (table.detach() for table in (empty(rows, 1, 64), empty(rows, 1, 64)))
    a, b, width = empty(rows, CHANNELS), empty(rows, CHANNELS), empty(CHANNELS)
    outputs = [
        *triton_add_rms_norm(hidden, update, weight, 1e-6),
        triton_rms_norm(hidden, weight, 1e-6),
        triton_mean_of_norms(a, width, b, width, 1e-6),
        triton_gated_silu(empty(rows, 5504), empty(rows, 5504)),
    ]
    for heads in (projected[:, :1600].unflatten(1, (25, 64)), projected[:, 1600:1920].unflatten(1, (5, 64))):
        outputs += [triton_rotate(heads, (cos, sin)), triton_norm_rotate(heads, empty(64), 1e-6, (cos, sin))]
    torch.cat([y.flatten() for y in outputs]).sum().backward()


@launches("triton_kernels")
def shared() -> None:
    """Launch the sum of the gradients of two weights of a layer."""
    summed_parts(torch.empty(512, 2, CHANNELS), torch.bfloat16)


@launches("convolution_kernels")
def convolution() -> None:
    """Launch the convolution of texts behind meta tokens, of texts that continue from a cache, and of one text."""
    weight, bias = empty(CHANNELS, 4), empty(CHANNELS)
    device = torch.device("cpu")
    offsets = torch.tensor([0, 100, 256])
    texts, cached = (find_documents((1, 256), device, num_meta=meta, cu_seqlens=offsets) for meta in (128, 0))
    tails = empty(2, 3, CHANNELS).detach()
    x = empty(128 + 256, PROJECTED)[:, 1600 : 1600 + CHANNELS]
    y, _ = triton_packed_conv1d(x, weight, bias, texts, None, keep=True)
    continued, _ = triton_packed_conv1d(x[128:], weight, bias, cached, tails, keep=True)
    torch.cat([y, continued, triton_conv1d(x, weight, bias)]).sum().backward()


@launches("attention_token_kernels")
def attention_of_one_token() -> None:
    """Launch attention of one token in each width of numbers, of one text in several parts and of many in one."""
    heads, groups, width, value_width, meta, columns = 25, 5, 64, 128, 128, 8192
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for texts, parts in ((1, 32), (64, 1)):
            query = empty(texts, heads, width, dtype=dtype)
            of_meta = empty(meta, groups, width, dtype=dtype), empty(meta, groups, value_width, dtype=dtype)
            buffers = [empty(texts, groups, columns, size, dtype=dtype) for size in (width, value_width)]
            with patch.object(attention_token_triton, "_parts", lambda *_, parts=parts: parts):
                triton_attend(query, of_meta, *buffers, torch.zeros(texts, dtype=torch.int64), 1024)


@launches("one_token_kernels")
def one_token() -> None:
    """Launch the operations of a decoded token as a layer does that computes keys, and as one that reuses others."""
    texts, heads, groups, width, value_width, rank, columns = 2, 25, 5, 64, 128, 100, 1056
    wide = heads * width + 2 * CHANNELS
    tables = empty(texts, 1, width), empty(texts, 1, width)
    key, value = (empty(texts, groups, columns, size) for size in (width, value_width))
    weights = empty(CHANNELS, 4), empty(CHANNELS), empty(texts, 3, CHANNELS)
    lengths = torch.zeros(texts, dtype=torch.int64)
    for projected, buffers in ((empty(texts, PROJECTED), (key, value)), (empty(texts, wide), (None, None))):
        inputs = (projected, width, None, None, 1e-6, tables, *buffers, lengths, *weights)
        triton_prepare(TokenInputs(*inputs))

    x, gate = empty(texts, CHANNELS), empty(texts, PROJECTED)[:, -CHANNELS:]
    norms = empty(rank), empty(STATES), empty(STATES)
    weights = empty(CHANNELS, rank), empty(CHANNELS), empty(CHANNELS, STATES), empty(CHANNELS)
    state = empty(texts, CHANNELS, STATES, dtype=torch.float32)
    triton_update(StateInputs(x, empty(texts, rank + 2 * STATES), gate, *norms, 1e-6, *weights, state))

    for rows in (1, 32, 64, 128):
        triton_gate_up(empty(rows, heads * width), empty(5504, heads * width), empty(5504, heads * width))

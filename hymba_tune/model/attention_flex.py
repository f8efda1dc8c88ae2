"""Attention through PyTorch's FlexAttention, directly on the packed rows.

`torch.compile` makes a Triton kernel that skips the blocks of keys that no query of a block can see, and masks only the
blocks that are partly visible (arXiv 2412.05496). The offsets of the texts determine these blocks, so no
``(rows, rows)`` mask is made.

Glossary: M meta tokens, T text tokens, H query heads, G key/value heads, a width of a query or key head, v width of a
value head. Keys and queries are numbered by packed row, the meta tokens first.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from .autocast import outside_autocast
from .backends import Task
from .documents import Documents

BLOCK = 128
"""The number of rows and columns in a block of the mask, a multiple of FlexAttention's own tiles."""
LEAST_WIDTH = 16
"""The narrowest head for which Triton supports matrix products."""
RECOMPILE_LIMIT = 64
"""How many kernels `torch.compile` may make: one for each dtype, with, without and outside of gradients. Its own limit
is 8, which a model in one dtype does not reach, but one run that trains, evaluates and samples in two dtypes does."""


@outside_autocast
def flex_packed_attention(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents, window: int | None
) -> Tensor:
    """Compute `packed_attention` in one compiled kernel for all texts.

    The first call of a process compiles the kernel; other lengths, windows and strides reuse it.

    Args:
        query: ``(M + T, H, a)``.
        key: ``(M + T, G, a)``.
        value: ``(M + T, G, v)``.
        documents: The layout of the packed texts.
        window: The number of earlier tokens that a query sees, or None for the whole text.

    Returns:
        ``(M + T, H * v)``.

    Raises:
        RuntimeError: If `torch.compile` would run FlexAttention without compiling it, with all scores in memory.
    """
    mask = block_mask(documents.starts, documents.num_meta, window, query.device)
    # Each set of strides would be compiled for. Values come as columns of the input projection's output.
    heads_first = (x.contiguous().transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    grouped = query.shape[1] != key.shape[1]

    settings = _compiler_settings()
    limit = settings.recompile_limit
    settings.recompile_limit = max(limit, RECOMPILE_LIMIT)
    try:
        output = _compiled()(*heads_first, block_mask=mask, enable_gqa=grouped, kernel_options=_tiles(query, value))
    finally:
        settings.recompile_limit = limit
    return output.squeeze(0).transpose(0, 1).flatten(1)


@cache
def flex_unavailable_reason() -> str | None:
    """Return why FlexAttention cannot be compiled on this machine, or None if it can."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if torch.cuda.get_device_capability() < (8, 0):
        return "Triton needs a GPU of compute capability 8.0 or more"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "Triton is not installed (pip install triton; on Windows triton-windows)"
    return None


def flex_unsupported_reason(task: Task) -> str | None:
    """Return why the head widths of a task are not supported, or None if they are."""
    if min(task.widths) < LEAST_WIDTH:
        return f"heads must be at least {LEAST_WIDTH} wide; they are {min(task.widths)}"
    return None


@cache
def _compiler_settings() -> Any:
    """Return the settings of `torch.compile`, whose import takes a second."""
    from torch._dynamo import config

    return config


@cache
def _compiled() -> Callable[..., Tensor]:
    """Return one function for all layers and steps. Without ``dynamic``, every new number of rows would recompile."""
    compiled: Callable[..., Tensor] = torch.compile(_only_compiled, dynamic=True)
    return compiled


def _only_compiled(*arguments: Any, **named: Any) -> Tensor:
    """Compute FlexAttention while `torch.compile` reads this function; refuse to be run as plain Python.

    Past its limit of recompilations, or where it is switched off, `torch.compile` runs a function as it is, in silence.
    FlexAttention then makes gigabytes of scores.
    """
    if not torch.compiler.is_compiling():
        raise RuntimeError(
            "torch.compile did not compile FlexAttention: it is switched off (TORCH_COMPILE_DISABLE) "
            f"or past its limit of {RECOMPILE_LIMIT} recompilations (TORCH_LOGS=recompiles)"
        )
    output: Tensor = flex_attention(*arguments, **named)
    return output


def _tiles(query: Tensor, value: Tensor) -> dict[str, int]:
    """Return the tile sizes for values that are wider than queries.

    PyTorch chooses tiles by the width of the queries alone. For queries of width 64 and values of width 128, its choice
    spills kilobytes of registers per thread; its choice for queries of width 128 spills none.
    """
    width, value_width = query.shape[-1], value.shape[-1]
    if query.dtype.itemsize == 2 and width <= 64 < value_width <= 128:
        return {"fwd_BLOCK_M": 128, "fwd_BLOCK_N": 64, "fwd_num_warps": 8}
    return {}


@lru_cache(maxsize=8)  # a global and a windowed mask for each of a few micro-batches
@torch.inference_mode(False)  # training can then use a mask that was made during evaluation
def block_mask(starts: tuple[int, ...], meta: int, window: int | None, device: torch.device) -> BlockMask:
    """Return which blocks of keys each block of queries sees, partly or fully.

    Args:
        starts: The index of the first token of each text among the T text tokens, followed by T.
        meta: The number M of meta tokens.
        window: The number of earlier tokens that a query sees, or None for the whole text.
        device: The device that computes the attention.
    """
    first = _first_keys(starts, meta, window, device)
    rows = len(first)
    # Sizes of 1 are compiled for, so there are two blocks at least. A block without rows sees none.
    count = max(2, -(-rows // BLOCK))

    # The last block is padded with its last row, which changes neither its minimum nor its maximum.
    by_block = first[torch.arange(count * BLOCK, device=device).clamp(max=rows - 1)].view(count, BLOCK)
    blocks = torch.arange(count, device=device)
    queries = blocks[:, None]
    begins = blocks * BLOCK

    # The runs of keys of neighboring queries overlap or touch, so a block of queries sees one run of keys.
    seen = (
        (blocks <= queries)
        & (queries * BLOCK < rows)
        & ((begins < meta) | (blocks >= by_block.amin(1)[:, None] // BLOCK))
    )
    all_meta = begins + BLOCK <= meta
    whole = seen & (blocks < queries) & (all_meta | (begins.clamp(min=meta) >= by_block.amax(1)[:, None]))

    number_of_meta = torch.tensor(meta, device=device)

    def visible(_batch: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        # The function captures tensors only, and `first` encodes texts and window, so all masks share one kernel.
        return (k <= q) & ((k >= first[q]) | (k < number_of_meta))

    return BlockMask.from_kv_blocks(
        *_listed(seen & ~whole), *_listed(whole), BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=(rows, rows)
    )


def _first_keys(starts: tuple[int, ...], meta: int, window: int | None, device: torch.device) -> Tensor:
    """Return ``(M + T,)`` int32: the first key of its own text that each row sees, and 0 for meta tokens."""
    begins = torch.tensor(starts, device=device)
    first = meta + begins[:-1].repeat_interleave(begins.diff(), output_size=starts[-1])
    if window is not None:
        first = first.maximum(torch.arange(meta, meta + starts[-1], device=device) - window)
    return torch.nn.functional.pad(first, (meta, 0)).int()


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of True blocks in each row of ``(blocks, blocks)``, and the block indices, True ones first.

    Both have batch and head axes in front.
    """
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[None, None], order.int()[None, None]

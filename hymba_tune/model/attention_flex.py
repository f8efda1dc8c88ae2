"""Attention through PyTorch's FlexAttention, on the packed rows as they are.

`torch.compile` makes a Triton kernel that skips the blocks of keys no query of a block can see and masks only the
blocks of which it can see a part (arXiv 2412.05496). Which blocks those are follows from where the texts begin, so no
``(rows, rows)`` mask is ever made.

Glossary: M meta tokens, T text tokens, H query heads, G key/value heads, a width of a query or key head, v width of a
value head. Keys and queries are numbered by packed row: the meta tokens first.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from .backends import Task
from .documents import Documents

BLOCK = 128
"""Rows and columns of a block of the mask; FlexAttention's own tiles divide it."""
LEAST_WIDTH = 16
"""The narrowest head of which Triton makes a matrix product."""


def flex_packed_attention(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents, window: int | None
) -> Tensor:
    """Attend as `packed_attention` says, in one compiled kernel for all texts.

    The first call of a process compiles; other lengths and windows use the same kernel.

    Args:
        query: ``(M + T, H, a)``.
        key: ``(M + T, G, a)``.
        value: ``(M + T, G, v)``.
        documents: Where the texts lie.
        window: Tokens a query looks back, or None for the whole text.

    Returns:
        ``(M + T, H * v)``.
    """
    mask = block_mask(documents.starts, documents.num_meta, window, query.device)
    heads_first = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    grouped = query.shape[1] != key.shape[1]
    output = _compiled()(*heads_first, block_mask=mask, enable_gqa=grouped, kernel_options=_tiles(query, value))
    return output.squeeze(0).transpose(0, 1).flatten(1)


@cache
def flex_unavailable_reason() -> str | None:
    """Why FlexAttention cannot be compiled on this machine, or None if it can."""
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
    """Why heads of a task's widths cannot be taken, or None if they can."""
    if min(task.widths) < LEAST_WIDTH:
        return f"heads must be {LEAST_WIDTH} wide or more, not {min(task.widths)}"
    return None


@cache
def _compiled() -> Callable[..., Tensor]:
    """One function for all layers and steps. Without ``dynamic`` every new number of rows would compile again."""
    compiled: Callable[..., Tensor] = torch.compile(flex_attention, dynamic=True)
    return compiled


def _tiles(query: Tensor, value: Tensor) -> dict[str, int]:
    """Tiles for values wider than queries.

    PyTorch chooses tiles by the width of the queries alone. With values of 128 beside queries of 64 its choice keeps
    kilobytes of each thread's registers in memory; what it takes for queries of 128 keeps none.
    """
    width, value_width = query.shape[-1], value.shape[-1]
    if query.dtype.itemsize == 2 and width <= 64 < value_width <= 128:
        return {"fwd_BLOCK_M": 128, "fwd_BLOCK_N": 64, "fwd_num_warps": 8}
    return {}


@lru_cache(maxsize=8)  # a global and a windowed mask for each layout of a few micro-batches
@torch.inference_mode(False)  # a mask made while evaluating serves the training too
def block_mask(starts: tuple[int, ...], meta: int, window: int | None, device: torch.device) -> BlockMask:
    """Which blocks of keys each block of queries sees, in part or whole.

    Args:
        starts: Where each text begins among the T text tokens, and T.
        meta: M.
        window: Tokens a query looks back, or None for the whole text.
        device: Where the attention is computed.
    """
    first = _first_keys(starts, meta, window, device)
    rows = len(first)
    count = -(-rows // BLOCK)
    # The last block is filled up with its last row, which changes neither its least nor its greatest.
    by_block = first[torch.arange(count * BLOCK, device=device).clamp(max=rows - 1)].view(count, BLOCK)
    blocks = torch.arange(count, device=device)
    queries, begins = blocks[:, None], blocks * BLOCK
    # What the queries of a block see of their texts is one run of keys: neighbors' runs overlap or touch.
    seen = (blocks <= queries) & ((begins < meta) | (blocks >= by_block.amin(1)[:, None] // BLOCK))
    all_meta = begins + BLOCK <= meta
    whole = (blocks < queries) & (all_meta | (begins.clamp(min=meta) >= by_block.amax(1)[:, None]))
    number_of_meta = torch.tensor(meta, device=device)

    def visible(_batch: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        # Tensors, not numbers, are captured, and `first` holds texts and window: any mask has the same kernel.
        return (k <= q) & ((k >= first[q]) | (k < number_of_meta))

    return BlockMask.from_kv_blocks(
        *_listed(seen & ~whole), *_listed(whole), BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=(rows, rows)
    )


def _first_keys(starts: tuple[int, ...], meta: int, window: int | None, device: torch.device) -> Tensor:
    """``(M + T,)`` int32, the first key of its own text that each row sees; for meta tokens the first of all."""
    begins = torch.tensor(starts, device=device)
    first = meta + begins[:-1].repeat_interleave(begins.diff(), output_size=starts[-1])
    if window is not None:
        first = first.maximum(torch.arange(meta, meta + starts[-1], device=device) - window)
    return torch.nn.functional.pad(first, (meta, 0)).int()


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks each row of ``(blocks, blocks)`` bool has, and which, those first; with batch and head axes."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[None, None], order.int()[None, None]

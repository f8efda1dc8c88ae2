"""Triton, if it is installed, and what the kernels of several operations share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

tl: Any = None
try:
    import triton

    tl = triton.language
except ImportError:
    triton = None

INSTALLED = triton is not None
OPTIONS = {"enable_fp_fusion": True}
"""The launch options of every kernel: multiply-add instructions are fused."""


def jit(kernel: Callable[..., Any]) -> Any:
    """Apply `triton.jit`; without Triton, return the function unchanged, since nothing calls it."""
    return triton.jit(kernel) if INSTALLED else kernel


@jit
def load(pointer: tl.tensor, inside: tl.tensor) -> tl.tensor:
    """Load values in float32, with zeros where the mask is False."""
    return tl.load(pointer, mask=inside, other=0.0).to(tl.float32)


@jit
def sum_parts(
    parts: tl.tensor,
    sums: tl.tensor,
    count: tl.tensor,
    columns: tl.tensor,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """Sum ``(count, columns)`` parts in a fixed order."""
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    part = tl.arange(0, BLOCK_P)[:, None]
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for first in range(0, count, BLOCK_P):
        inside = (first + part < count) & (column < columns)[None, :]
        total += load(parts + (first + part).to(tl.int64) * columns + column[None, :], inside)
    tl.store(sums + column, tl.sum(total, 0), mask=column < columns)


INTERPRETED = INSTALLED and not isinstance(load, triton.JITFunction)
"""Whether Triton was imported under TRITON_INTERPRET=1, so that the kernels run in Python, on any device."""


def triton_unavailable_reason() -> str | None:
    """Return why Triton's kernels cannot run on this machine, or None if they can, on a GPU or interpreted."""
    if not INSTALLED:
        return "triton is not installed; pip install triton"
    if INTERPRETED or torch.cuda.is_available():
        return None
    return "no CUDA or ROCm device was found; with TRITON_INTERPRET=1 in the environment Triton is interpreted, slowly"


def summed_parts(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sum of float32 parts over their first dimension, in a dtype, in one launch."""
    sums = parts.new_empty(parts.shape[1:], dtype=dtype)
    columns = sums.numel()
    grid = (-(-columns // 64),)
    sum_parts[grid](parts, sums, len(parts), columns, BLOCK_P=16, BLOCK_C=64, num_warps=4, **OPTIONS)
    return sums


def readable(x: Tensor) -> Tensor:
    """Return x with contiguous rows; it may be columns of a wider matrix, so that a projection need not be copied."""
    return x if x.stride(-1) == 1 else x.contiguous()


def power_of_2(size: int) -> int:
    """Return the smallest power of two that is not below a size; the sizes of Triton's blocks are powers of two."""
    return 1 << (size - 1).bit_length()

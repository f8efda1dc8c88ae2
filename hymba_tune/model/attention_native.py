"""Attention in C++ for the CPU: MKL matrix products around a softmax that reads only the keys a query sees.

Glossary: M meta tokens, T text tokens, H query heads, G key/value heads, a width of a query or key head, v width of a
value head.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .attention_native_source import SOURCE
from .documents import Documents
from .memoized import memoized
from .native import DTYPES, Arguments, Grid, Library, fields, threads_for

BLOCK = 32
"""The number of queries in a block."""
LIBRARY = Library("attention", SOURCE, BLOCK=BLOCK)
PRODUCTS = {torch.float32: "SGEMM", torch.bfloat16: "GEMM_BF16BF16F32"}
"""The MKL function for each input dtype; both have float32 results."""


def native_attention(query: Tensor, key: Tensor, value: Tensor, documents: Documents, window: int | None) -> Tensor:
    """Compute `packed_attention` in float32 or bfloat16.

    Only the scores of one block are held at a time, so the time and memory of a windowed layer grow linearly with T.
    """
    output: Tensor = _NativeAttention.apply(*map(_readable, (query, key, value)), documents, window)
    return output.flatten(1)


@cache
def native_unavailable_reason() -> str | None:
    """Return why native attention cannot run on this machine, or None if it can. The first call compiles it."""
    if not all(map(_product, DTYPES)):
        return "this build of PyTorch contains no MKL"
    return LIBRARY.unavailable_reason()


@cache
def _product(dtype: torch.dtype) -> ctypes.c_void_p | None:
    try:
        libtorch = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return ctypes.cast(getattr(libtorch, PRODUCTS[dtype]), ctypes.c_void_p)
    except (OSError, AttributeError):
        return None


def _readable(heads: Tensor) -> Tensor:
    """Return ``(rows, heads, width)`` with adjacent heads, copied if needed; it may be columns of a wider matrix."""
    return heads if heads.stride()[1:] == (heads.shape[2], 1) else heads.contiguous()


class _Arguments(Arguments):
    _fields_ = (
        *fields(ctypes.c_int64, "heads groups width value_width meta text threads"),
        *fields(ctypes.c_void_p, "first_seen"),
        *fields(Grid, "q k v y dy dq"),
        *fields(ctypes.c_void_p, "lse dk dv gemm"),
    )


class _NativeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, documents: Documents, window: int | None
    ) -> Tensor:
        output = query.new_empty(*query.shape[:2], value.shape[2])
        lse = query.new_empty(query.shape[:2], dtype=torch.float32)
        ctx.layout = documents.num_meta, _first_seen(documents.starts, window)
        _call("forward", query, key, value, *ctx.layout, y=output, lse=lse)
        ctx.save_for_backward(query, key, value, output, lse)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, lse = ctx.saved_tensors
        d_query = query.new_empty(query.shape)
        # Many blocks add to these gradients; in bfloat16 each addition would round.
        d_key, d_value = (torch.zeros(x.shape, dtype=torch.float32) for x in (key, value))
        gradients = {"dy": _readable(d_output), "dq": d_query, "dk": d_key, "dv": d_value}
        _call("backward", query, key, value, *ctx.layout, y=output, lse=lse, **gradients)
        return d_query, d_key.to(key.dtype), d_value.to(value.dtype), None, None


def _call(
    function: str, query: Tensor, key: Tensor, value: Tensor, meta: int, first_seen: Tensor, **others: Tensor
) -> None:
    rows, heads, width = query.shape
    groups, value_width = value.shape[1:]
    arguments = _Arguments(
        heads=heads,
        groups=groups,
        width=width,
        value_width=value_width,
        meta=meta,
        text=rows - meta,
        threads=threads_for(rows * heads * BLOCK * width),
        first_seen=first_seen,
        q=query,
        k=key,
        v=value,
        gemm=_product(query.dtype),
        **others,
    )
    LIBRARY.call(function, arguments)


@memoized
def _first_seen(starts: tuple[int, ...], window: int | None) -> Tensor:
    """Return ``(T,)`` int64: the first text token that each text token sees."""
    offsets = torch.tensor(starts)
    begins = offsets[:-1].repeat_interleave(offsets.diff(), output_size=starts[-1])
    return begins if window is None else torch.maximum(begins, torch.arange(starts[-1]) - window)

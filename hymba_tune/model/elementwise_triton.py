"""Norm, gate and rotation on a GPU, in Triton: one launch forward, and one or two backward.

The backward computes everything again from the inputs, which are all that is saved. The programs sum the gradients of a
weight over their own rows, and one more launch adds these sums, so that the result is deterministic.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# With exported code, transformers copies the modules of these imports, but not those of `from . import`.
from .elementwise_kernels import (
    gated_silu,
    gated_silu_backward,
    mean_of_norms,
    mean_of_norms_backward,
    norm,
    norm_backward,
    rotate,
)
from .triton_kernels import OPTIONS, power_of_2, readable, summed_parts

BLOCK = 1024
"""The number of elements of a block of narrow heads, and of a block of the gate."""
PER_THREAD = 8
"""The number of elements of a thread: 16 bytes of bfloat16, which it reads at a time."""
STRIPS = 512
"""The largest number of programs that sum the gradients of a weight."""
LEAST = 8
"""The smallest number of blocks of such a program, unless there are fewer."""

Tables = tuple[Tensor, Tensor]


def triton_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute `rms_norm` of ``(rows, width)``, or of ``(rows, heads, width)`` with one weight or one per head."""
    with torch.cuda.device_of(x):
        normed: Tensor = _Norm.apply(readable(x), weight.contiguous(), eps, None, None)
    return normed


def triton_norm_rotate(heads: Tensor, weight: Tensor, eps: float, tables: Tables) -> Tensor:
    """Compute `norm_rotate` of ``(rows, heads, width)``."""
    with torch.cuda.device_of(heads):
        rotated: Tensor = _Norm.apply(readable(heads), weight.contiguous(), eps, *_rows_of(tables))
    return rotated


def triton_add_rms_norm(x: Tensor, update: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Compute `add_rms_norm` of ``(rows, width)``."""
    with torch.cuda.device_of(x):
        total, normed = _AddNorm.apply(readable(x), readable(update), weight.contiguous(), eps)
    return total, normed


def triton_mean_of_norms(a: Tensor, a_weight: Tensor, b: Tensor, b_weight: Tensor, eps: float) -> Tensor:
    """Compute `mean_of_norms` of ``(rows, width)``."""
    with torch.cuda.device_of(a):
        mean: Tensor = _MeanOfNorms.apply(readable(a), a_weight.contiguous(), readable(b), b_weight.contiguous(), eps)
    return mean


def triton_gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """Compute `gated_silu` of ``(rows, width)``."""
    with torch.cuda.device_of(gate):
        gated: Tensor = _Gate.apply(readable(gate), readable(up))
    return gated


def triton_rotate(heads: Tensor, tables: Tables) -> Tensor:
    """Compute `rotate` of ``(rows, heads, width)``."""
    with torch.cuda.device_of(heads):
        rotated: Tensor = _Rotate.apply(readable(heads), *_rows_of(tables))
    return rotated


def _rows_of(tables: Tables) -> Tables:
    """Return the tables ``(rows, width)`` with the same strides."""
    cos, sin = (readable(table.squeeze(1)) for table in tables)
    return (cos, sin) if cos.stride() == sin.stride() else (cos.contiguous(), sin.contiguous())


def _blocks(x: Tensor, weight: Tensor | None = None) -> tuple[tuple[int, int], dict[str, Any]]:
    """Return the numbers of blocks and of weights, and the sizes of the kernels, for ``(rows, [heads,] width)``."""
    rows, heads, width = len(x), x.shape[1:-1].numel(), x.shape[-1]
    weights = heads if weight is not None and weight.ndim > 1 else 1
    block_w = power_of_2(width)
    block_r = max(1, BLOCK // block_w)
    sizes = {"rows": rows, "heads": heads, "shared": heads // weights, "width": width}
    warps = min(max(1, block_r * block_w // (32 * PER_THREAD)), 16)
    sizes |= {"BLOCK_R": block_r, "BLOCK_W": block_w, "num_warps": warps} | OPTIONS
    return (-(-rows * (heads // weights) // block_r), weights), sizes


def _strips(blocks: int) -> int:
    """Return the number of programs that share these blocks, and each sum the gradients of a weight."""
    return min(STRIPS, -(-blocks // LEAST))


def _strides(name: str, x: Tensor) -> dict[str, int]:
    return {f"{name}_row": x.stride(0), f"{name}_head": x.stride(1) if x.ndim > 2 else 0}


def _row(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def _forward(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    update: Tensor | None = None,
    total: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> Tensor:
    """Return the norm of x, or of its sum with an update, which is written to a tensor."""
    summed = x if total is None else total
    y = x.new_empty(x.shape, dtype=torch.promote_types(summed.dtype, weight.dtype))
    grid, sizes = _blocks(x, weight)
    sizes |= _strides("x", x) | {"update_row": _row(update), "table_row": _row(cos), "eps": eps}
    norm[grid](x, update, weight, cos, sin, total, y, **sizes)
    return y


def _backward(
    x: Tensor,
    weight: Tensor,
    eps: float,
    dy: Tensor,
    dx: Tensor | None,
    *,
    need_weight: bool,
    d_total: Tensor | None = None,
    d_update: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> Tensor | None:
    """Write the gradient of the input and return that of the weight."""
    (blocks, weights), sizes = _blocks(x, weight)
    programs = _strips(blocks) if need_weight else blocks
    parts = x.new_empty(programs, *weight.shape, dtype=torch.float32) if need_weight else None
    sizes |= _strides("x", x) | _strides("dy", dy)
    sizes |= {"d_total_row": _row(d_total), "table_row": _row(cos), "eps": eps}
    norm_backward[programs, weights](x, weight, cos, sin, dy, d_total, dx, d_update, parts, **sizes)
    return None if parts is None else summed_parts(parts, weight.dtype)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, cos, sin)
        ctx.eps = eps
        return _forward(x, weight, eps, cos=cos, sin=sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, cos, sin = ctx.saved_tensors
        need_x, need_weight, *_ = ctx.needs_input_grad
        dx = x.new_empty(x.shape) if need_x else None
        d_weight = _backward(x, weight, ctx.eps, readable(dy), dx, need_weight=need_weight, cos=cos, sin=sin)
        return dx, d_weight, None, None, None


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, update: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, update.dtype))
        y = _forward(x, weight, eps, update=update, total=total)
        ctx.save_for_backward(total, weight)
        ctx.eps = eps
        ctx.dtypes = x.dtype, update.dtype
        ctx.set_materialize_grads(False)
        return total, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor | None, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight = ctx.saved_tensors
        need_x, need_update, need_weight, _ = ctx.needs_input_grad
        x_dtype, update_dtype = ctx.dtypes
        if dy is None:
            dx, d_update = (None if d_total is None else d_total.to(dtype) for dtype in ctx.dtypes)
            return dx, d_update, None, None
        d_total = None if d_total is None else readable(d_total)
        dx = total.new_empty(total.shape, dtype=x_dtype) if need_x or need_update else None
        other = need_update and update_dtype != x_dtype
        d_update = total.new_empty(total.shape, dtype=update_dtype) if other else dx
        d_weight = _backward(
            total,
            weight,
            ctx.eps,
            readable(dy),
            dx,
            need_weight=need_weight,
            d_total=d_total,
            d_update=d_update if other else None,
        )
        return dx, d_update, d_weight, None


class _MeanOfNorms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, a_weight: Tensor, b: Tensor, b_weight: Tensor, eps: float) -> Tensor:
        y = a.new_empty(a.shape, dtype=torch.promote_types(a.dtype, a_weight.dtype))
        (blocks, _), sizes = _mean_blocks(a, b, eps)
        mean_of_norms[blocks,](a, a_weight, b, b_weight, y, **sizes)
        ctx.save_for_backward(a, a_weight, b, b_weight)
        ctx.eps = eps
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        a, a_weight, b, b_weight = ctx.saved_tensors
        dy = readable(dy)
        da, db = a.new_empty(a.shape), b.new_empty(b.shape)
        (blocks, _), sizes = _mean_blocks(a, b, ctx.eps)
        need_weights = ctx.needs_input_grad[1] or ctx.needs_input_grad[3]
        programs = _strips(blocks) if need_weights else blocks
        parts = a.new_empty(programs, 2, a.shape[1], dtype=torch.float32) if need_weights else None
        inputs = a, a_weight, b, b_weight, dy
        mean_of_norms_backward[programs,](*inputs, da, db, parts, **sizes, dy_row=dy.stride(0))
        if parts is None:
            return da, None, db, None, None
        d_a_weight, d_b_weight = summed_parts(parts, torch.promote_types(a_weight.dtype, b_weight.dtype))
        return da, d_a_weight.to(a_weight.dtype), db, d_b_weight.to(b_weight.dtype), None


def _mean_blocks(a: Tensor, b: Tensor, eps: float) -> tuple[tuple[int, int], dict[str, Any]]:
    grid, sizes = _blocks(a)
    del sizes["heads"], sizes["shared"]
    return grid, sizes | {"a_row": a.stride(0), "b_row": b.stride(0), "eps": eps}


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        y = gate.new_empty(gate.shape)
        grid, sizes = _gate_blocks(gate, up)
        gated_silu[grid](gate, up, y, **sizes)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        dy = readable(dy)
        d_gate, d_up = gate.new_empty(gate.shape), up.new_empty(up.shape)
        grid, sizes = _gate_blocks(gate, up)
        gated_silu_backward[grid](gate, up, dy, d_gate, d_up, **sizes, dy_row=dy.stride(0))
        return d_gate, d_up


def _gate_blocks(gate: Tensor, up: Tensor) -> tuple[tuple[int, int], dict[str, Any]]:
    rows, width = gate.shape
    block = min(BLOCK, power_of_2(width))
    sizes: dict[str, Any] = {"gate_row": gate.stride(0), "up_row": up.stride(0), "width": width}
    sizes |= {"BLOCK_W": block, "num_warps": max(1, block // (32 * PER_THREAD))} | OPTIONS
    return (rows, -(-width // block)), sizes


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(heads, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_rotated: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _rotated(readable(d_rotated), cos, sin, -1), None, None


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    y = heads.new_empty(heads.shape)
    grid, sizes = _blocks(heads)
    rotate[grid](heads, cos, sin, y, **sizes, **_strides("x", heads), table_row=cos.stride(0), direction=direction)
    return y

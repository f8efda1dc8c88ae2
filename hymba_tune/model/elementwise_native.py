"""Norm, gate and rotation in C++ for the CPU, in float32 or bfloat16, with fewer passes over memory than torch.

The functions compute in float32 and round at the same steps as `elementwise`.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .elementwise_native_source import SOURCE
from .native import Arguments, Grid, Library, Rows, fields, readable, threads_for

STRIPS = 64
"""The number of parts into which the rows are divided for the threads."""
LIBRARY = Library("elementwise", SOURCE, STRIPS=STRIPS)
STEPS = 4
"""The cost of an element, in the steps that `threads_for` counts."""


def native_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute `rms_norm` of ``(rows, width)``, or of ``(rows, heads, width)`` with one weight or one per head."""
    if x.ndim == 2 and not torch.is_grad_enabled():
        return _add_norm(x, None, weight, eps)[1]
    normed: Tensor = _Norm.apply(readable(x), weight, eps)
    return normed


def native_add_rms_norm(x: Tensor, update: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Compute `add_rms_norm` of ``(rows, width)``."""
    if x.dtype is update.dtype and not torch.is_grad_enabled():
        return _add_norm(x, update, weight, eps)
    total = x + update
    return total, native_rms_norm(total, weight, eps)


def native_norm_rotate(heads: Tensor, weight: Tensor, eps: float, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Compute `norm_rotate` of ``(rows, heads, width)``."""
    return native_rotate(native_rms_norm(heads, weight, eps), tables)


def native_mean_of_norms(a: Tensor, a_weight: Tensor, b: Tensor, b_weight: Tensor, eps: float) -> Tensor:
    """Compute `mean_of_norms` of ``(rows, width)``."""
    if not torch.is_grad_enabled():
        return _final_mean(a, a_weight, b, b_weight, eps)
    mean: Tensor = _MeanOfNorms.apply(readable(a), a_weight, readable(b), b_weight, eps)
    return mean


def native_gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """Compute `gated_silu` of ``(rows, width)``."""
    gated: Tensor = _Gate.apply(readable(gate), readable(up))
    return gated


def native_rotate(heads: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Compute `rotate` of ``(rows, heads, width)``."""
    rotated: Tensor = _Rotate.apply(readable(heads), *tables)
    return rotated


class _AddNormArguments(Arguments):
    _fields_ = (
        *fields(ctypes.c_int64, "rows width threads"),
        *fields(ctypes.c_float, "eps"),
        *fields(Rows, "x update weight total y"),
    )


def _add_norm(x: Tensor, update: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Compute `add_rms_norm` without gradients, or the norm of x alone."""
    x, weight = readable(x), readable(weight)
    y = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype))
    total = x if update is None else x.new_empty(x.shape)
    arguments = _AddNormArguments(
        rows=len(x),
        width=x.shape[1],
        threads=threads_for(STEPS * x.numel()),
        eps=eps,
        x=x,
        update=None if update is None else readable(update),
        weight=weight[None],
        total=total,
        y=y,
    )
    LIBRARY.call("add_norm", arguments)
    return total, y


class _FinalMeanArguments(Arguments):
    _fields_ = (
        *fields(ctypes.c_int64, "rows width threads"),
        *fields(ctypes.c_float, "eps"),
        *fields(Rows, "a b a_weight b_weight y"),
    )


def _final_mean(a: Tensor, a_weight: Tensor, b: Tensor, b_weight: Tensor, eps: float) -> Tensor:
    """Compute `mean_of_norms` without gradients."""
    y = a.new_empty(a.shape, dtype=torch.promote_types(a.dtype, a_weight.dtype))
    arguments = _FinalMeanArguments(
        rows=len(a),
        width=a.shape[1],
        threads=threads_for(2 * STEPS * a.numel()),
        eps=eps,
        a=readable(a),
        b=readable(b),
        a_weight=readable(a_weight)[None],
        b_weight=readable(b_weight)[None],
        y=y,
    )
    LIBRARY.call("final_mean", arguments)
    return y


class _NormArguments(Arguments):
    _fields_ = (
        *fields(ctypes.c_int64, "rows heads width threads"),
        *fields(ctypes.c_float, "eps"),
        *fields(Grid, "x y dy dx"),
        *fields(ctypes.c_void_p, "weight"),
        *fields(ctypes.c_int64, "weight_stride"),
        *fields(ctypes.c_void_p, "scale d_weights"),
    )

    @classmethod
    def of(cls, x: Tensor, weight: Tensor, **others: Any) -> _NormArguments:
        """Return the arguments for x of shape ``(rows, heads, width)``."""
        rows, heads, width = x.shape
        stride = weight.stride(0) if weight.ndim > 1 else 0
        threads = threads_for(STEPS * x.numel())
        return cls(
            rows=rows, heads=heads, width=width, threads=threads, x=x, weight=weight, weight_stride=stride, **others
        )


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype))
        grid = _with_heads(x)
        scale = torch.empty(grid.shape[:2], dtype=torch.float32)
        float_weight = weight.float().contiguous()
        LIBRARY.call("norm_forward", _NormArguments.of(grid, float_weight, eps=eps, y=_with_heads(y), scale=scale))
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        need_x, need_weight, _ = ctx.needs_input_grad
        dx = x.new_empty(x.shape) if need_x else None
        parts = torch.empty(STRIPS, *weight.shape, dtype=torch.float32) if need_weight else None
        arguments = _NormArguments.of(
            _with_heads(x),
            weight.float().contiguous(),
            dy=_with_heads(readable(dy)),
            dx=None if dx is None else _with_heads(dx),
            scale=scale,
            d_weights=parts,
        )
        LIBRARY.call("norm_backward", arguments)
        return dx, None if parts is None else parts.sum(0).to(weight.dtype), None


def _with_heads(x: Tensor) -> Tensor:
    return x if x.ndim > 2 else x[:, None]


class _MeanOfNormsArguments(Arguments):
    _fields_ = (
        *fields(ctypes.c_int64, "rows width threads"),
        *fields(ctypes.c_float, "eps"),
        *fields(Rows, "a b y dy da db"),
        *fields(ctypes.c_void_p, "a_weight b_weight scales d_weights"),
    )


class _MeanOfNorms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, a_weight: Tensor, b: Tensor, b_weight: Tensor, eps: float) -> Tensor:
        inputs = a, a_weight, b, b_weight, torch.empty(len(a), 2, dtype=torch.float32)
        y = a.new_empty(a.shape, dtype=torch.promote_types(a.dtype, a_weight.dtype))
        _mean_of_norms("mean_of_norms_forward", *inputs, eps=eps, y=y)
        ctx.save_for_backward(*inputs)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        saved = a, a_weight, b, b_weight, _ = ctx.saved_tensors  # under checkpointing it can be read only once
        da, db = a.new_empty(a.shape), b.new_empty(b.shape)
        need_weights = ctx.needs_input_grad[1] or ctx.needs_input_grad[3]
        parts = torch.empty(STRIPS, 2, a.shape[1], dtype=torch.float32) if need_weights else None
        gradients = {"dy": readable(dy), "da": da, "db": db, "d_weights": parts}
        _mean_of_norms("mean_of_norms_backward", *saved, **gradients)
        if parts is None:
            return da, None, db, None, None
        d_a_weight, d_b_weight = parts.sum(0)
        return da, d_a_weight.to(a_weight.dtype), db, d_b_weight.to(b_weight.dtype), None


def _mean_of_norms(
    function: str, a: Tensor, a_weight: Tensor, b: Tensor, b_weight: Tensor, scales: Tensor, **others: Any
) -> None:
    rows, width = a.shape
    arguments = _MeanOfNormsArguments(
        rows=rows,
        width=width,
        threads=threads_for(2 * STEPS * a.numel()),
        a=a,
        b=b,
        a_weight=a_weight.float().contiguous(),
        b_weight=b_weight.float().contiguous(),
        scales=scales,
        **others,
    )
    LIBRARY.call(function, arguments)


class _GateArguments(Arguments):
    _fields_ = (*fields(ctypes.c_int64, "rows width threads"), *fields(Rows, "gate up y dy d_gate d_up"))


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        y = gate.new_empty(gate.shape)
        _gate("gate_forward", gate, up, y=y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        d_gate, d_up = gate.new_empty(gate.shape), up.new_empty(up.shape)
        _gate("gate_backward", gate, up, dy=readable(dy), d_gate=d_gate, d_up=d_up)
        return d_gate, d_up


def _gate(function: str, gate: Tensor, up: Tensor, **others: Tensor) -> None:
    rows, width = gate.shape
    threads = threads_for(STEPS * gate.numel())
    LIBRARY.call(function, _GateArguments(rows=rows, width=width, threads=threads, gate=gate, up=up, **others))


class _RotateArguments(Arguments):
    _fields_ = (
        *fields(ctypes.c_int64, "rows heads width threads"),
        *fields(ctypes.c_float, "direction"),
        *fields(Grid, "x y"),
        *fields(Rows, "cos sin"),
    )


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


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    y = x.new_empty(x.shape)
    rows, heads, width = x.shape
    tables = {"cos": readable(cos.squeeze(1)), "sin": readable(sin.squeeze(1))}
    threads = threads_for(STEPS * x.numel())
    sizes = {"rows": rows, "heads": heads, "width": width}
    LIBRARY.call("rotate", _RotateArguments(**sizes, threads=threads, direction=direction, x=x, y=y, **tables))
    return y

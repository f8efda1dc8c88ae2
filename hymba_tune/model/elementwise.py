"""Norms, gates and rotations that keep only their inputs for the backward, and compute in place what is theirs.

Left to autograd, the norms of a bfloat16 model keep more memory than all of its linear layers: float32 copies of what
they norm, before and after. On a CPU, taking fresh memory also costs more time than the arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

from .autocast import outside_autocast
from .backends import Backend, Operation, Problem, Task, random_leaves
from .elementwise_native import LIBRARY, native_gated_silu, native_mean_of_norms, native_rms_norm, native_rotate
from .native import DTYPES

FEW = 2**14
"""Numbers below which calls cost more than arithmetic."""


def _few(x: Tensor) -> bool:
    """Whether a choice and a call of our own cost more than they save: at a step of generation."""
    return x.numel() < FEW and not torch.is_grad_enabled()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension (arXiv 1910.07467): statistics in float32, cast back, weighed.

    Args:
        x: ``(rows, width)`` or ``(rows, heads, width)``.
        weight: ``(width,)`` for all rows and heads, or ``(heads, width)``.
        eps: Added to the mean square.

    Returns:
        As x, in the dtype that x and the weight promote to.
    """
    if _few(x):
        return torch.rms_norm(x, x.shape[-1:], eps=eps) * weight
    normed: Tensor = ELEMENTWISE.choose(Task.of(x, weight)).run.rms_norm(x, weight, eps)
    return normed


def mean_of_norms(a: Tensor, a_weight: Tensor, b: Tensor, b_weight: Tensor, eps: float) -> Tensor:
    """Half the sum of the `rms_norm` of a and that of b, both ``(rows, width)`` of one dtype."""
    if _few(a):
        return _torch_mean_of_norms(a, a_weight, b, b_weight, eps)
    mean: Tensor = ELEMENTWISE.choose(Task.of(a, a_weight, b)).run.mean_of_norms(a, a_weight, b, b_weight, eps)
    return mean


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``, both ``(rows, width)`` of one dtype (arXiv 2002.05202)."""
    if _few(gate):
        return silu(gate).mul_(up)
    gated: Tensor = ELEMENTWISE.choose(Task.of(gate, up)).run.gated_silu(gate, up)
    return gated


def rotate(heads: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Turn ``(rows, heads, width)`` by its positions; feature i is paired with feature i + width / 2.

    Args:
        heads: Queries or keys.
        tables: Of `rotary_tables`.
    """
    if _few(heads):
        return _turned(heads, *tables, 1)
    turned: Tensor = ELEMENTWISE.choose(Task.of(heads)).run.rotate(heads, tables)
    return turned


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return _times((x * scale).to(x.dtype), weight)

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        need_x, need_weight, _ = ctx.needs_input_grad
        normed = x * scale
        products = dy * normed
        # A copy, since the products' memory is used again and a weight of x's shape would share it.
        d_weight = products.sum_to_size(weight.shape).to(weight.dtype, copy=True) if need_weight else None
        if not need_x:
            return None, d_weight, None
        weight = weight.to(scale.dtype)
        along = products @ weight if weight.ndim == 1 else (products * weight).sum(-1)
        d_normed = torch.mul(dy, weight, out=products)
        dx = d_normed.addcmul_(normed, along[..., None], value=-1 / x.shape[-1]).mul_(scale)
        return dx.to(x.dtype), d_weight, None


class _GatedSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        d_gate = torch.ops.aten.silu_backward(dy * up, gate)
        return d_gate, silu(gate).mul_(dy)


def _times(x: Tensor, weight: Tensor) -> Tensor:
    """The product, in x's memory if it fits there."""
    return x.mul_(weight) if torch.promote_types(x.dtype, weight.dtype) == x.dtype else x * weight


class _Rotation(torch.autograd.Function):
    """Its gradient is turned back by the same angles, so nothing else is kept."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(heads, cos, sin, 1)

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx: Any, d_turned: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _turned(d_turned, cos, sin, -1), None, None


def _turned(heads: Tensor, cos: Tensor, sin: Tensor, way: int) -> Tensor:
    turned = heads * cos
    first, second = heads.chunk(2, -1)
    first_turned, second_turned = turned.chunk(2, -1)
    first_sin, second_sin = sin.chunk(2, -1)
    first_turned.addcmul_(second, first_sin, value=-way)
    second_turned.addcmul_(first, second_sin, value=way)
    return turned.to(heads.dtype)


def _torch_mean_of_norms(a: Tensor, a_weight: Tensor, b: Tensor, b_weight: Tensor, eps: float) -> Tensor:
    normed_a, normed_b = (rms_norm(x, weight, eps) for x, weight in ((a, a_weight), (b, b_weight)))
    return (normed_a + normed_b).mul_(0.5)


def _torch_rotate(heads: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    turned: Tensor = _Rotation.apply(heads, *tables)
    return turned


class Elementwise(NamedTuple):
    """One way to compute what does not mix tokens."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    mean_of_norms: Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]
    gated_silu: Callable[[Tensor, Tensor], Tensor]
    rotate: Callable[[Tensor, tuple[Tensor, Tensor]], Tensor]


def _small_problem(task: Task) -> Problem:
    x, gate, weight = random_leaves(task, [(20, 3, 32), (20, 32), (32,)])
    cos, sin = (table.detach() for table in random_leaves(task, [(20, 1, 32)] * 2))

    def compute(backend: Backend) -> tuple[Tensor, ...]:
        by = backend.run
        mean = by.mean_of_norms(gate, weight, gate, weight, 1e-6)
        return by.rms_norm(x, weight, 1e-6), mean, by.gated_silu(gate, gate), by.rotate(x, (cos, sin))

    return Problem(compute, [x, gate, weight])


ELEMENTWISE = Operation(
    "elementwise",
    [
        Backend(
            "native",
            Elementwise(native_rms_norm, native_mean_of_norms, native_gated_silu, native_rotate),
            ("cpu",),
            DTYPES,
            unavailable_reason=LIBRARY.unavailable_reason,
        ),
        Backend("torch", Elementwise(_RMSNorm.apply, _torch_mean_of_norms, _GatedSilu.apply, _torch_rotate)),
    ],
    plain="torch",
    problem=_small_problem,
)
"""The ways to compute norms, gates and rotations, the fastest first."""

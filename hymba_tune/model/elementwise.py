"""Norms, gates and rotations that save only their inputs for the backward and compute in place in their own tensors.

With plain autograd, the norms of a bfloat16 model save more memory than all of its linear layers, namely float32 copies
of their inputs and of the normalized values. On a CPU, allocating memory also takes more time than the arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

from .autocast import outside_autocast
from .backends import GPU_DTYPES, Backend, Operation, Problem, Task, random_leaves
from .elementwise_native import (
    LIBRARY,
    native_add_rms_norm,
    native_gated_silu,
    native_mean_of_norms,
    native_norm_rotate,
    native_rms_norm,
    native_rotate,
)
from .elementwise_triton import (
    triton_add_rms_norm,
    triton_gated_silu,
    triton_mean_of_norms,
    triton_norm_rotate,
    triton_rms_norm,
    triton_rotate,
)
from .native import DTYPES
from .triton_kernels import triton_unavailable_reason

FEW = 2**14
"""The number of elements below which a call costs more time than the arithmetic on a CPU."""


def _few(x: Tensor) -> bool:
    """Return whether selecting and calling a backend on a CPU would cost more than it saves, as in generation.

    On a GPU the number of launches decides, and kernels have fewer.
    """
    return x.device.type == "cpu" and x.numel() < FEW and not torch.is_grad_enabled()


def _few_in_torch(x: Tensor) -> bool:
    """Return the same for a norm, which in C++ is one call and in torch about eight, with code that no cache holds."""
    return _few(x) and (x.ndim > 2 or ELEMENTWISE.choose(Task.of(x)).name != "native")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute the root-mean-square norm over the last dimension (arXiv 1910.07467).

    The statistics are in float32; the normalized values are cast back before the weight is applied.

    Args:
        x: ``(rows, width)`` or ``(rows, heads, width)``.
        weight: ``(width,)`` for all rows and heads, or ``(heads, width)``.
        eps: The number added to the mean square.

    Returns:
        The shape of x, in the dtype to which x and the weight promote.
    """
    if _few_in_torch(x):
        return _torch_rms_norm(x, weight, eps)
    normed: Tensor = ELEMENTWISE.compute(Task.of(x, weight), x, weight, eps, function="rms_norm")
    return normed


def add_rms_norm(x: Tensor, update: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add an update to the residual stream x, both ``(rows, width)``, and return the sum and its `rms_norm`."""
    if _few_in_torch(x):
        return _torch_add_rms_norm(x, update, weight, eps)
    added: tuple[Tensor, Tensor]
    added = ELEMENTWISE.compute(Task.of(x, update, weight), x, update, weight, eps, function="add_rms_norm")
    return added


def mean_of_norms(a: Tensor, a_weight: Tensor, b: Tensor, b_weight: Tensor, eps: float) -> Tensor:
    """Return the mean of the `rms_norm` of a and that of b, both ``(rows, width)`` of one dtype."""
    if _few_in_torch(a):
        return _torch_mean_of_norms(a, a_weight, b, b_weight, eps)
    mean: Tensor = ELEMENTWISE.compute(Task.of(a, a_weight, b), a, a_weight, b, b_weight, eps, function="mean_of_norms")
    return mean


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """Return ``silu(gate) * up``, both ``(rows, width)`` of one dtype (arXiv 2002.05202)."""
    if _few(gate):
        return silu(gate).mul_(up)
    gated: Tensor = ELEMENTWISE.compute(Task.of(gate, up), gate, up, function="gated_silu")
    return gated


def rotate(heads: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate queries or keys by their positions; feature i is paired with feature i + width / 2.

    Args:
        heads: Queries or keys, ``(rows, heads, width)``.
        tables: The cosines and sines from `rotary_tables`.
    """
    if _few(heads):
        return _torch_rotate(heads, tables)
    rotated: Tensor = ELEMENTWISE.compute(Task.of(heads), heads, tables, function="rotate")
    return rotated


def norm_rotate(heads: Tensor, weight: Tensor, eps: float, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Return the `rotate` of the `rms_norm` of queries or keys ``(rows, heads, width)``."""
    if _few(heads):
        return _torch_norm_rotate(heads, weight, eps, tables)
    rotated: Tensor = ELEMENTWISE.compute(Task.of(heads, weight), heads, weight, eps, tables, function="norm_rotate")
    return rotated


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return _multiply((x * scale).to(x.dtype), weight)

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        need_x, need_weight, _ = ctx.needs_input_grad
        normed = x * scale
        products = dy * normed

        # The result is copied: the memory of the products is reused below, and a weight of x's shape would share it.
        d_weight = products.sum_to_size(weight.shape).to(weight.dtype, copy=True) if need_weight else None
        if not need_x:
            return None, d_weight, None

        weight = weight.to(scale.dtype)
        inner = products @ weight if weight.ndim == 1 else (products * weight).sum(-1)
        d_normed = torch.mul(dy, weight, out=products)
        dx = d_normed.addcmul_(normed, inner[..., None], value=-1 / x.shape[-1]).mul_(scale)
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


def _multiply(x: Tensor, weight: Tensor) -> Tensor:
    """Return the product, in the memory of x if it has the same dtype."""
    return x.mul_(weight) if torch.promote_types(x.dtype, weight.dtype) == x.dtype else x * weight


class _Rotation(torch.autograd.Function):
    """A rotation. Its gradient is rotated back by the same angles, so only the tables are saved."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(heads, cos, sin, 1)

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx: Any, d_rotated: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _rotated(d_rotated, cos, sin, -1), None, None


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    rotated = heads * cos
    first, second = heads.chunk(2, -1)
    first_rotated, second_rotated = rotated.chunk(2, -1)
    first_sin, second_sin = sin.chunk(2, -1)
    first_rotated.addcmul_(second, first_sin, value=-direction)
    second_rotated.addcmul_(first, second_sin, value=direction)
    return rotated.to(heads.dtype)


def _torch_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if _few(x) or (x.device.type != "cpu" and not torch.is_grad_enabled()):  # one kernel on a GPU
        return torch.rms_norm(x, x.shape[-1:], eps=eps) * weight
    normed: Tensor = _RMSNorm.apply(x, weight, eps)
    return normed


def _torch_add_rms_norm(x: Tensor, update: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + update
    return total, _torch_rms_norm(total, weight, eps)


def _torch_mean_of_norms(a: Tensor, a_weight: Tensor, b: Tensor, b_weight: Tensor, eps: float) -> Tensor:
    normed_a, normed_b = (_torch_rms_norm(x, weight, eps) for x, weight in ((a, a_weight), (b, b_weight)))
    return (normed_a + normed_b).mul_(0.5)


def _torch_rotate(heads: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    if _few(heads):
        return _rotated(heads, *tables, 1)
    rotated: Tensor = _Rotation.apply(heads, *tables)
    return rotated


def _torch_norm_rotate(heads: Tensor, weight: Tensor, eps: float, tables: tuple[Tensor, Tensor]) -> Tensor:
    return _torch_rotate(_torch_rms_norm(heads, weight, eps), tables)


class Elementwise(NamedTuple):
    """The functions of one backend that compute each token on its own."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    mean_of_norms: Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]
    gated_silu: Callable[[Tensor, Tensor], Tensor]
    rotate: Callable[[Tensor, tuple[Tensor, Tensor]], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    norm_rotate: Callable[[Tensor, Tensor, float, tuple[Tensor, Tensor]], Tensor]


def _small_problem(task: Task) -> Problem:
    x, gate, weight = random_leaves(task, [(20, 3, 32), (20, 32), (32,)])
    cos, sin = (table.detach() for table in random_leaves(task, [(20, 1, 32)] * 2))

    def compute(backend: Backend) -> tuple[Tensor, ...]:
        functions = backend.run
        normed = functions.rms_norm(x, weight, 1e-6)
        mean = functions.mean_of_norms(gate, weight, gate, weight, 1e-6)
        added = functions.add_rms_norm(gate, mean, weight, 1e-6)
        queries = functions.norm_rotate(x, weight, 1e-6, (cos, sin))
        return normed, mean, *added, functions.gated_silu(gate, gate), functions.rotate(x, (cos, sin)), queries

    return Problem(compute, [x, gate, weight])


ELEMENTWISE = Operation(
    "elementwise",
    [
        Backend(
            "native",
            Elementwise(
                native_rms_norm,
                native_mean_of_norms,
                native_gated_silu,
                native_rotate,
                native_add_rms_norm,
                native_norm_rotate,
            ),
            ("cpu",),
            DTYPES,
            unavailable_reason=LIBRARY.unavailable_reason,
        ),
        Backend(
            "triton",
            Elementwise(
                triton_rms_norm,
                triton_mean_of_norms,
                triton_gated_silu,
                triton_rotate,
                triton_add_rms_norm,
                triton_norm_rotate,
            ),
            ("cuda",),
            GPU_DTYPES,
            needs_self_test=True,
            unavailable_reason=triton_unavailable_reason,
        ),
        Backend(
            "torch",
            Elementwise(
                _torch_rms_norm,
                _torch_mean_of_norms,
                _GatedSilu.apply,
                _torch_rotate,
                _torch_add_rms_norm,
                _torch_norm_rotate,
            ),
        ),
    ],
    plain="torch",
    problem=_small_problem,
)
"""The backends of norms, gates and rotations, the fastest first."""

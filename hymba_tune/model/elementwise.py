"""Norms and gates that keep only their inputs for the backward, and compute in place what is theirs.

Left to autograd, the norms of a bfloat16 model keep more memory than all of its linear layers: float32 copies of what
they norm, before and after. On a CPU, taking fresh memory also costs more time than the arithmetic.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension (arXiv 1910.07467): statistics in float32, cast back, weighed.

    Args:
        x: ``(..., width)``.
        weight: Broadcasts over x.
        eps: Added to the mean square.

    Returns:
        ``(..., width)``, in the dtype that x and the weight promote to.
    """
    if not torch.is_grad_enabled():
        # One call instead of ten: for the few tokens of a step of generation, calls are what costs.
        return torch.rms_norm(x, x.shape[-1:], eps=eps) * weight
    normed: Tensor = _RMSNorm.apply(x, weight, eps)
    return normed


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``, both ``(..., width)`` of one dtype (arXiv 2002.05202)."""
    gated: Tensor = _GatedSilu.apply(gate, up)
    return gated


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
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        d_gate = torch.ops.aten.silu_backward(dy * up, gate)
        return d_gate, silu(gate).mul_(dy)


def _times(x: Tensor, weight: Tensor) -> Tensor:
    """The product, in x's memory if it fits there."""
    return x.mul_(weight) if torch.promote_types(x.dtype, weight.dtype) == x.dtype else x * weight

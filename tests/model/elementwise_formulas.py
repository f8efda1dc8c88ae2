"""The formulas of norms, gates and rotations, and a check of a backend against them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hymba_tune.model.elementwise import Elementwise
from tests.tolerances import BFLOAT16, FLOAT32_GRADIENT, FLOAT64

# A norm of one element has a gradient near zero, made of two large terms.
TOLERANCES = {torch.float64: FLOAT64, torch.float32: FLOAT32_GRADIENT, torch.bfloat16: BFLOAT16}


def naive_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() * weight


def naive_gate(gate: Tensor, up: Tensor) -> Tensor:
    return gate * torch.sigmoid(gate) * up


def all_gradients(function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: list[Tensor]) -> dict[str, Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    weights = [torch.linspace(-1, 1, y.numel()).view_as(y).bfloat16().to(y.dtype) for y in outputs]
    grads = torch.autograd.grad(outputs, leaves, weights)
    named = {"y": outputs, "gradient": grads}
    return {f"{name} {i}": tensor for name, tensors in named.items() for i, tensor in enumerate(tensors)}


def naive_rotation(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def check_formulas(kernels: Elementwise, rows: int, width: int, dtype: torch.dtype) -> None:
    """Check outputs and gradients of all functions on inputs of these sizes, which are columns of a wider matrix."""
    tolerance = TOLERANCES[dtype]
    # The inputs are columns of a wider matrix, like the outputs of one projection.
    wide = torch.randn(rows, 6 * width).to(dtype)
    x, a, b, _ = wide.split([3 * width, width, width, width], -1)
    heads = x.unflatten(-1, (3, width))
    weight, other, *_ = per_head = torch.randn(3, width).to(dtype)
    cos, sin = (
        torch.randn(2, rows, 1, width // 2).to(dtype).repeat(1, 1, 1, 2)
    )  # both features of a pair are rotated by the same angle

    def naive_mean(a: Tensor, a_weight: Tensor, b: Tensor, b_weight: Tensor) -> Tensor:
        return (naive_norm(a, a_weight) + naive_norm(b, b_weight)) / 2

    def naive_sum(x: Tensor, update: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return x + update, naive_norm(x + update, weight)

    def naive_turn(h: Tensor, weight: Tensor) -> Tensor:
        return naive_rotation(naive_norm(h, weight), cos.to(h), sin.to(h))

    cases: list[tuple[Callable[..., Any], Callable[..., Any], list[Tensor]]] = [
        (lambda *xs: kernels.rms_norm(*xs, 1e-3), naive_norm, [a, weight]),
        (lambda *xs: kernels.rms_norm(*xs, 1e-3), naive_norm, [heads, weight]),
        (lambda *xs: kernels.rms_norm(*xs, 1e-3), naive_norm, [heads, per_head]),
        (lambda *xs: kernels.mean_of_norms(*xs, 1e-3), naive_mean, [a, weight, b, other]),
        (kernels.gated_silu, naive_gate, [a, b]),
        (lambda h: kernels.rotate(h, (cos, sin)), lambda h: naive_rotation(h, cos.to(h), sin.to(h)), [heads]),
        (lambda *xs: kernels.add_rms_norm(*xs, 1e-3), naive_sum, [a, b, weight]),
        (lambda *xs: kernels.norm_rotate(*xs, 1e-3, (cos, sin)), naive_turn, [heads, weight]),
        (lambda *xs: kernels.norm_rotate(*xs, 1e-3, (cos, sin)), naive_turn, [heads, per_head]),
    ]
    for function, naive, inputs in cases:
        actual = all_gradients(function, inputs)
        assert all(tensor.dtype == dtype for tensor in actual.values())
        tolerance.check_all(actual, all_gradients(naive, [x.double() for x in inputs]))

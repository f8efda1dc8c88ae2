"""Norm and gate against the formulas as they are written: outputs and every gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hymba_tune.model.elementwise import gated_silu, rms_norm
from tests.tolerances import BFLOAT16, FLOAT32_GRADIENT, FLOAT64

# A norm of one element has a gradient near zero, made of two large terms.
TOLERANCES = {torch.float64: FLOAT64, torch.float32: FLOAT32_GRADIENT, torch.bfloat16: BFLOAT16}


def naive_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() * weight


def naive_gate(gate: Tensor, up: Tensor) -> Tensor:
    return gate * torch.sigmoid(gate) * up


def with_gradients(function: Callable[..., Tensor], *inputs: Tensor) -> dict[str, Tensor | None]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = function(*leaves)
    weights = torch.linspace(-1, 1, y.numel()).view_as(y).bfloat16().to(y.dtype)
    first, second = torch.autograd.grad(y, leaves, weights)
    return {"y": y, "first": first, "second": second}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(
    ("shape", "weight_shape"), [((7, 12), (12,)), ((1, 1), (1,)), ((5, 3, 1, 4), (1, 3, 1, 4))], ids=str
)
def test_norm_is_its_formula(shape: tuple[int, ...], weight_shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = torch.randn(shape, dtype=dtype), torch.randn(weight_shape, dtype=dtype)
    expected = with_gradients(naive_norm, x.double(), weight.double())
    actual = with_gradients(lambda *both: rms_norm(*both, 1e-3), x, weight)
    assert all(tensor is not None and tensor.dtype == dtype for tensor in actual.values())
    TOLERANCES[dtype].check_all(actual, expected)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_gate_is_its_formula(dtype: torch.dtype) -> None:
    gate, up = torch.randn(2, 7, 12, dtype=dtype)
    expected = with_gradients(naive_gate, gate.double(), up.double())
    TOLERANCES[dtype].check_all(with_gradients(gated_silu, gate, up), expected)


def test_norm_of_narrow_inputs_takes_a_wide_weight() -> None:
    x, weight = torch.randn(7, 12).bfloat16(), torch.randn(12)
    y = rms_norm(x, weight, 1e-3)
    assert y.dtype == torch.float32  # as x times the weight is
    BFLOAT16.check(y, naive_norm(x.double(), weight.double()))


def test_norm_of_large_and_of_no_values() -> None:
    assert torch.equal(rms_norm(torch.full((1, 4), 1e15), torch.ones(4), 1e-6), torch.ones(1, 4))
    assert torch.equal(rms_norm(torch.zeros(1, 4), torch.ones(4), 1e-6), torch.zeros(1, 4))
    assert rms_norm(torch.zeros(0, 4), torch.ones(4), 1e-6).shape == (0, 4)


def test_inputs_are_left_as_they_were() -> None:
    x, weight, up, given = torch.randn(7, 12), torch.randn(12), torch.randn(7, 12), torch.randn(7, 12)
    before = [tensor.clone() for tensor in (x, weight, up, given)]
    for function in (lambda a, b: rms_norm(a, b[0], 1e-3), gated_silu):
        first, second = x.clone().requires_grad_(), up.clone().requires_grad_()
        torch.autograd.grad(function(first, second), [first, second], given)
        assert torch.equal(first, before[0])
        assert torch.equal(second, before[2])
    assert torch.equal(given, before[3])


@pytest.mark.parametrize("function", [lambda x, weight: rms_norm(x, weight, 1e-3), gated_silu], ids=["norm", "gate"])
def test_gradcheck(function: Callable[..., Tensor]) -> None:
    inputs = [torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(function, inputs)


def test_only_the_inputs_are_kept() -> None:
    kept: list[Tensor] = []
    x, weight = torch.randn(7, 12).bfloat16().requires_grad_(), torch.ones(12).bfloat16()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        rms_norm(x, weight, 1e-3)
        gated_silu(x, x)
    assert {tensor.data_ptr() for tensor in kept if tensor.numel() == x.numel()} == {x.data_ptr()}

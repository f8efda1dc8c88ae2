"""Norm, gate and rotation against their formulas: outputs and all gradients, in torch and in C++."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hymba_tune.model.elementwise import (
    ELEMENTWISE,
    Elementwise,
    add_rms_norm,
    gated_silu,
    mean_of_norms,
    norm_rotate,
    rms_norm,
    rotate,
)
from tests.model.elementwise_formulas import (
    TOLERANCES,
    all_gradients,
    check_formulas,
    naive_gate,
    naive_norm,
    naive_rotation,
)
from tests.tolerances import BFLOAT16, FLOAT32


def with_gradients(function: Callable[..., Tensor], *inputs: Tensor) -> dict[str, Tensor | None]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = function(*leaves)
    weights = torch.linspace(-1, 1, y.numel()).view_as(y).bfloat16().to(y.dtype)
    first, second = torch.autograd.grad(y, leaves, weights)
    return {"y": y, "first": first, "second": second}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(
    ("shape", "weight_shape"), [((7, 12), (12,)), ((1, 1), (1,)), ((5, 3, 4), (3, 4)), ((5, 3, 33), (33,))], ids=str
)
def test_norm_equals_its_formula(shape: tuple[int, ...], weight_shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = torch.randn(shape, dtype=dtype), torch.randn(weight_shape, dtype=dtype)
    expected = with_gradients(naive_norm, x.double(), weight.double())
    actual = with_gradients(lambda *both: rms_norm(*both, 1e-3), x, weight)
    assert all(tensor is not None and tensor.dtype == dtype for tensor in actual.values())
    TOLERANCES[dtype].check_all(actual, expected)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_gate_equals_its_formula(dtype: torch.dtype) -> None:
    gate, up = torch.randn(2, 7, 12, dtype=dtype)
    expected = with_gradients(naive_gate, gate.double(), up.double())
    TOLERANCES[dtype].check_all(with_gradients(gated_silu, gate, up), expected)


def test_norm_of_bfloat16_inputs_supports_a_float32_weight() -> None:
    x, weight = torch.randn(7, 12).bfloat16(), torch.randn(12)
    y = rms_norm(x, weight, 1e-3)
    assert y.dtype == torch.float32  # the dtype of x times the weight
    BFLOAT16.check(y, naive_norm(x.double(), weight.double()))


def test_norm_of_large_values_of_zeros_and_of_no_rows() -> None:
    assert torch.equal(rms_norm(torch.full((1, 4), 1e15), torch.ones(4), 1e-6), torch.ones(1, 4))
    assert torch.equal(rms_norm(torch.zeros(1, 4), torch.ones(4), 1e-6), torch.zeros(1, 4))
    assert rms_norm(torch.zeros(0, 4), torch.ones(4), 1e-6).shape == (0, 4)


def test_inputs_are_not_changed() -> None:
    x, up, d_y = torch.randn(3, 7, 12)
    before = [tensor.clone() for tensor in (x, up, d_y)]
    for function in (lambda a, b: rms_norm(a, b[0], 1e-3), gated_silu):
        first, second = x.clone().requires_grad_(), up.clone().requires_grad_()
        torch.autograd.grad(function(first, second), [first, second], d_y)
        assert torch.equal(first, before[0])
        assert torch.equal(second, before[1])
    assert torch.equal(d_y, before[2])


@pytest.mark.parametrize("function", [lambda x, weight: rms_norm(x, weight, 1e-3), gated_silu], ids=["norm", "gate"])
def test_gradcheck(function: Callable[..., Tensor]) -> None:
    inputs = [torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(function, inputs)


def test_only_the_inputs_are_saved() -> None:
    saved: list[Tensor] = []
    x, weight = torch.randn(7, 12).bfloat16().requires_grad_(), torch.ones(12).bfloat16()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        rms_norm(x, weight, 1e-3)
        gated_silu(x, x)
    assert {tensor.data_ptr() for tensor in saved if tensor.numel() == x.numel()} == {x.data_ptr()}


@pytest.fixture(params=["torch", "native"])
def kernels(request: pytest.FixtureRequest) -> Elementwise:
    """Return the functions of each backend."""
    backend = ELEMENTWISE.backends[request.param]
    if reason := backend.unavailable_reason():
        pytest.skip(reason)
    kernels: Elementwise = backend.run
    return kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [2, 14, 16, 34, 80])
@pytest.mark.parametrize("rows", [1, 7, 65])
def test_every_backend_equals_the_formulas(kernels: Elementwise, rows: int, width: int, dtype: torch.dtype) -> None:
    check_formulas(kernels, rows, width, dtype)


def test_inputs_that_need_no_gradient_get_none(kernels: Elementwise) -> None:
    x, weight = torch.randn(7, 12), torch.randn(12)
    for needs_x, needs_weight in ((True, False), (False, True)):
        leaf, leaf_weight = x.clone().requires_grad_(needs_x), weight.clone().requires_grad_(needs_weight)
        kernels.rms_norm(leaf, leaf_weight, 1e-3).square().sum().backward()
        kernels.mean_of_norms(leaf, leaf_weight, x, weight, 1e-3).square().sum().backward()
        assert (leaf.grad is not None, leaf_weight.grad is not None) == (needs_x, needs_weight)


def test_the_same_bits_on_any_number_of_threads() -> None:
    x, weight = torch.randn(3000, 64), torch.randn(64)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(all_gradients(lambda *xs: rms_norm(*xs, 1e-6), [x, weight]))
    torch.set_num_threads(1)
    assert all(tensor.equal(results[0][name]) for result in results for name, tensor in result.items())


def test_small_inputs_without_gradients_give_the_same_results() -> None:
    x, weight, tables = torch.randn(3, 2, 8), torch.randn(8), tuple(torch.randn(2, 3, 1, 4).repeat(1, 1, 1, 2))
    flat = x[:, 0]
    with torch.no_grad():
        FLOAT32.check(rms_norm(x, weight, 1e-6), rms_norm(x.requires_grad_(), weight, 1e-6).double())
        mean = mean_of_norms(flat, weight, flat, weight, 1e-6)
        added = add_rms_norm(flat, flat, weight, 1e-6)
        turned = norm_rotate(x, weight, 1e-6, tables)
    FLOAT32.check(mean, mean_of_norms(flat, weight, flat, weight, 1e-6).double())
    FLOAT32.check(rotate(x, tables), naive_rotation(x, *tables).double())
    for actual, expected in zip(added, add_rms_norm(flat, flat, weight, 1e-6), strict=True):
        FLOAT32.check(actual, expected.double())
    FLOAT32.check(turned, norm_rotate(x, weight, 1e-6, tables).double())

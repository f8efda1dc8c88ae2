"""The Triton norms, gates and rotations against their formulas, interpreted without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hymba_tune.model import elementwise_triton
from hymba_tune.model.backends import Task
from hymba_tune.model.elementwise import ELEMENTWISE, Elementwise
from hymba_tune.model.triton_kernels import triton_unavailable_reason
from tests.model.elementwise_formulas import all_gradients, check_formulas, naive_norm
from tests.model.triton_launches import launches
from tests.tolerances import BFLOAT16, FLOAT32, FLOAT32_GRADIENT

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNELS: Elementwise = ELEMENTWISE.backends["triton"].run
TWIN: Elementwise = ELEMENTWISE.backends["torch"].run
EPS = 1e-3


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use blocks so small that a few rows need several; skip if Triton is not installed."""
    if reason := triton_unavailable_reason():
        pytest.skip(reason)
    for name, size in {"BLOCK": 32, "STRIPS": 2, "LEAST": 1}.items():
        monkeypatch.setattr(elementwise_triton, name, size)


def cases(rows: int, width: int, dtype: torch.dtype = torch.float32) -> dict[str, tuple[Callable[..., Any], Any]]:
    """Return, for each function, a call of it with a backend, and its inputs."""
    a, b = torch.randn(2, rows, width, device=DEVICE).to(dtype)
    heads = torch.randn(rows, 2, width, device=DEVICE).to(dtype)
    weight, other = torch.randn(2, width, device=DEVICE).to(dtype)
    tables = tuple(torch.randn(2, rows, 1, width // 2, device=DEVICE).to(dtype).repeat(1, 1, 1, 2))
    return {
        "rms_norm": (lambda run, *xs: run.rms_norm(*xs, EPS), [a, weight]),
        "norm of heads": (lambda run, *xs: run.rms_norm(*xs, EPS), [heads, torch.stack([weight, other])]),
        "mean_of_norms": (lambda run, *xs: run.mean_of_norms(*xs, EPS), [a, weight, b, other]),
        "gated_silu": (lambda run, *xs: run.gated_silu(*xs), [a, b]),
        "rotate": (lambda run, h: run.rotate(h, tables), [heads]),
        "add_rms_norm": (lambda run, *xs: run.add_rms_norm(*xs, EPS), [a, b, weight]),
        "norm_rotate": (lambda run, *xs: run.norm_rotate(*xs, EPS, tables), [heads, weight]),
    }


NAMES = list(cases(1, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 2), (5, 34)])
def test_equals_the_formulas(rows: int, width: int, dtype: torch.dtype) -> None:
    check_formulas(KERNELS, rows, width, dtype)


@pytest.mark.parametrize("name", NAMES)
def test_no_rows_and_autocast_and_gradients_that_are_not_contiguous(name: str) -> None:
    call, inputs = cases(0, 6)[name]
    actual, expected = (all_gradients(lambda *xs, run=run: call(run, *xs), inputs) for run in (KERNELS, TWIN))
    FLOAT32_GRADIENT.check_all(actual, expected)

    call, inputs = cases(3, 6)[name]
    results = []
    for run, autocast in ((KERNELS, True), (TWIN, False)):
        leaves = [x.clone().requires_grad_() for x in inputs]
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            outputs = call(run, *leaves)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            weights = [torch.linspace(-1, 1, len(y), device=DEVICE) for y in outputs]
            gradients = [w.view(-1, *[1] * (y.ndim - 1)).expand_as(y) for w, y in zip(weights, outputs, strict=True)]
            results.append(torch.autograd.grad(outputs, leaves, gradients))
    for result, twin in zip(*results, strict=True):
        FLOAT32_GRADIENT.check(result, twin)


@pytest.mark.parametrize("name", NAMES)
def test_one_launch_forward_and_one_backward_and_one_for_the_sums_of_a_weight(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, inputs = cases(9, 8)[name]
    has_weight = name not in ("gated_silu", "rotate")
    for needs_weight in (False, True):
        leaves = [x.clone().requires_grad_(needs_weight or x.shape[0] == 9) for x in inputs]
        started = launches(monkeypatch)
        outputs = call(KERNELS, *leaves)
        assert len(started) == 1
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
        assert len(started) == 2 + (needs_weight and has_weight), started
        assert all((leaf.grad is not None) == leaf.requires_grad for leaf in leaves)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_bits_again_and_only_inputs_are_saved(name: str) -> None:
    call, inputs = cases(9, 8, torch.bfloat16)[name]
    first, second = (all_gradients(lambda *xs: call(KERNELS, *xs), inputs) for _ in range(2))
    assert all(tensor.equal(second[result]) for result, tensor in first.items())

    saved: list[Tensor] = []
    leaves = [x.requires_grad_() for x in inputs]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        outputs = call(KERNELS, *leaves)
    kept = {x.data_ptr() for x in (*leaves, *(outputs if isinstance(outputs, tuple) else ()))}
    tables = [x for x in saved if x.ndim == 2 and x.data_ptr() not in kept]
    assert len(tables) == (2 if "rotate" in name else 0)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
def test_inputs_of_different_dtypes(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    x, update = torch.randn(2, 5, 6, device=DEVICE)
    weight = torch.randn(6, device=DEVICE)
    inputs = [x.to(dtypes[0]), update.to(dtypes[1]), weight]
    actual, expected = (
        all_gradients(lambda *xs, run=run: run.add_rms_norm(*xs, EPS), inputs) for run in (KERNELS, TWIN)
    )
    assert {name: tensor.dtype for name, tensor in actual.items()} == {n: t.dtype for n, t in expected.items()}
    BFLOAT16.check_all(actual, expected)

    y = KERNELS.rms_norm(x.bfloat16(), weight, EPS)
    assert y.dtype == torch.float32
    BFLOAT16.check(y.cpu(), naive_norm(x.double(), weight.double()).cpu())


@pytest.mark.parametrize("output", [0, 1], ids=["sum", "norm"])
def test_gradients_of_one_output_of_the_sum_and_its_norm(output: int) -> None:
    inputs = torch.randn(2, 5, 6, device=DEVICE)
    results = []
    for run in (KERNELS, TWIN):
        leaves = [x.clone().requires_grad_() for x in (*inputs, inputs[0, 0])]
        y = run.add_rms_norm(*leaves, EPS)[output]
        results.append(torch.autograd.grad(y.square().sum(), leaves, allow_unused=True, materialize_grads=True))
    for actual, expected in zip(*results, strict=True):
        FLOAT32_GRADIENT.check(actual, expected)


def test_without_gradients_nothing_is_saved_and_large_values_do_not_overflow() -> None:
    x, weight = torch.full((2, 6), 1e15, device=DEVICE), torch.ones(6, device=DEVICE)
    with torch.no_grad():
        FLOAT32.check(KERNELS.rms_norm(x, weight, 1e-6), torch.ones_like(x))
        assert KERNELS.rms_norm(torch.zeros_like(x), weight, 1e-6).eq(0).all()


def test_the_small_problem_of_the_self_test_is_solved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # with the blocks of a GPU
    assert ELEMENTWISE._self_test(ELEMENTWISE.backends["triton"], Task(DEVICE, torch.float32)) is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [64, 1600, 3200, 5504])
def test_compiled_equals_torch(width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # with the blocks of a GPU
    for name, (call, inputs) in cases(2048, width, dtype).items():
        expected, actual, again = (
            all_gradients(lambda *xs, run=run, call=call: call(run, *xs), inputs) for run in (TWIN, KERNELS, KERNELS)
        )
        for result, tensor in actual.items():
            (FLOAT32_GRADIENT if dtype == torch.float32 else BFLOAT16).check(
                tensor, expected[result], f"{name} {result}"
            )
            assert tensor.equal(again[result])

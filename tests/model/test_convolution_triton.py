"""The Triton convolution against plain torch, interpreted without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hymba_tune.model import convolution_triton
from hymba_tune.model.backends import Task
from hymba_tune.model.convolution import CONVOLUTION, Convolution
from hymba_tune.model.documents import Documents, find_documents
from hymba_tune.model.triton_kernels import triton_unavailable_reason
from tests.model.triton_launches import launches
from tests.tolerances import BFLOAT16, FLOAT32, FLOAT32_GRADIENT

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNELS: Convolution = CONVOLUTION.backends["triton"].run
TWIN: Convolution = CONVOLUTION.backends["torch"].run
LENGTHS = [3, 1, 6]
"""Texts as long as the window in front of a token, shorter, and longer than a block."""


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use blocks so small that a few tokens and channels need several; skip if Triton is not installed."""
    if reason := triton_unavailable_reason():
        pytest.skip(reason)
    for name, size in {"TOKENS": 4, "CHANNELS": 4, "BLOCKS": 2, "STRIPS": 2}.items():
        monkeypatch.setattr(convolution_triton, name, size)


def layout(lengths: list[int], meta: int) -> Documents:
    offsets = torch.tensor([0, *lengths], device=DEVICE).cumsum(0)
    return find_documents((1, sum(lengths)), torch.device(DEVICE), num_meta=meta, cu_seqlens=offsets)


def random_inputs(
    rows: int, channels: int = 6, width: int = 4, *, bias: bool = True, dtype: torch.dtype = torch.float32
) -> list[Tensor | None]:
    """Return columns of a wider matrix, a weight and a bias."""
    x = torch.randn(rows, channels + 3, device=DEVICE)[:, 1 : channels + 1]
    weight, offset = torch.randn(channels, width, device=DEVICE), torch.randn(channels, device=DEVICE)
    return [x.to(dtype), weight.to(dtype), offset.to(dtype) if bias else None]


def with_gradients(
    function: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor | None], wide: bool = False
) -> dict[str, Tensor]:
    """Return y, the last inputs and the gradients of a weighted sum of y."""
    leaves = [None if x is None else x.detach().to(torch.float64 if wide else x.dtype).requires_grad_() for x in inputs]
    y, tails = function(*leaves)
    weights = torch.linspace(-1, 1, y.numel(), device=DEVICE).view_as(y).bfloat16().to(y.dtype)
    known = [leaf for leaf in leaves if leaf is not None]
    results = {"y": y, **dict(zip("xwb", torch.autograd.grad(y, known, weights), strict=False))}
    return results if tails is None else results | {"tails": tails}


def check(run: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> None:
    assert all(tensor.dtype == dtype for tensor in run.values())
    (FLOAT32_GRADIENT if dtype == torch.float32 else BFLOAT16).check_all(run, expected)


@pytest.mark.parametrize(
    ("lengths", "meta", "width", "dtype"),
    [
        (LENGTHS, 5, 4, torch.bfloat16),
        (LENGTHS, 2, 4, torch.float32),
        ([9], 1, 2, torch.float32),
        ([1, 1, 1, 1, 1], 4, 3, torch.float32),
        ([2, 5], 3, 1, torch.bfloat16),
    ],
    ids=str,
)
def test_meta_tokens_and_texts_in_one_launch(
    lengths: list[int], meta: int, width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = layout(lengths, meta)
    inputs = random_inputs(meta + sum(lengths), width=width, dtype=dtype)
    expected = with_gradients(lambda *xs: TWIN.packed(*xs, documents, None, False), inputs, wide=True)
    started = launches(monkeypatch)
    actual = with_gradients(lambda *xs: KERNELS.packed(*xs, documents, None, False), inputs)
    assert started == ["convolve", "convolve_backward", "sum_parts"]
    check(actual, expected, dtype)


@pytest.mark.parametrize("lengths", [LENGTHS, [1, 1, 1]], ids=["chunks", "one token each"])
def test_texts_continue_from_cached_inputs(lengths: list[int]) -> None:
    documents = layout(lengths, 0)
    tails = torch.randn(len(lengths), 3, 6, device=DEVICE)
    inputs = random_inputs(sum(lengths), bias=False)
    actual, expected = (
        with_gradients(lambda *xs, run=run: run.packed(*xs, documents, tails.to(xs[0]), False), inputs)
        for run in (KERNELS, TWIN)
    )
    check(actual, expected)


@pytest.mark.parametrize("meta", [0, 2, 5])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_the_last_inputs_are_part_of_the_launch(meta: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = layout(LENGTHS, meta)
    tails = None if meta else torch.randn(3, width - 1, 6, device=DEVICE)
    inputs = random_inputs(meta + 10, width=width)
    with torch.no_grad():
        expected = TWIN.packed(*inputs, documents, tails, True)
        started = launches(monkeypatch)
        actual = KERNELS.packed(*inputs, documents, tails, True)
    assert started == ["convolve"]
    for result, wanted in zip(actual, expected, strict=True):
        FLOAT32.check(result, wanted)


def test_gradients_reach_the_last_inputs_and_the_cached_ones() -> None:
    for documents, tails in ((layout(LENGTHS, 5), None), (layout(LENGTHS, 0), torch.randn(3, 3, 6, device=DEVICE))):
        inputs = random_inputs(sum(LENGTHS) + documents.num_meta)
        results = []
        for run in (KERNELS, TWIN):
            leaves = [x.detach().requires_grad_() for x in (*inputs, tails) if x is not None]
            cached = None if tails is None else leaves[3]
            y, last = run.packed(*leaves[:3], documents, cached, True)
            results.append(torch.autograd.grad(y.square().sum() + last.square().sum(), leaves))
        for actual, expected in zip(*results, strict=True):
            FLOAT32_GRADIENT.check(actual, expected)


@pytest.mark.parametrize(("rows", "channels"), [(1, 1), (9, 5), (0, 4)])
def test_one_text_from_zeros(rows: int, channels: int) -> None:
    inputs = random_inputs(rows, channels)
    actual, expected = (with_gradients(lambda *xs, run=run: (run.alone(*xs), None), inputs) for run in (KERNELS, TWIN))
    check(actual, expected)


def test_a_frozen_weight_saves_the_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = layout(LENGTHS, 5)
    x, weight, bias = random_inputs(15)
    assert x is not None
    results = []
    for run in (TWIN, KERNELS):
        leaf = x.detach().requires_grad_()
        started = launches(monkeypatch)
        y, _ = run.packed(leaf, weight, bias, documents, None, False)
        y.square().sum().backward()
        results.append(leaf.grad)
    assert started == ["convolve", "convolve_backward"]
    FLOAT32_GRADIENT.check(results[1], results[0])


def test_autocast_and_another_run_give_the_same_bits() -> None:
    documents = layout([2, 3], 4)
    inputs: Any = random_inputs(9, 3)

    def convolved(*tensors: Tensor) -> tuple[Tensor, Tensor | None]:
        return KERNELS.packed(*tensors, documents, None, False)

    plain, again = (with_gradients(convolved, inputs) for _ in range(2))
    with torch.autocast(DEVICE, torch.bfloat16):
        narrow = with_gradients(convolved, inputs)
    assert all(again[name].equal(x) and narrow[name].equal(x) for name, x in plain.items())


def test_only_the_inputs_are_saved() -> None:
    documents = layout(LENGTHS, 5)
    x, weight, bias = (None if t is None else t.requires_grad_() for t in random_inputs(15, dtype=torch.bfloat16))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        KERNELS.packed(x, weight, bias, documents, None, False)
    known = {t.data_ptr() for t in (x, weight, bias, documents.ids, documents.cu_seqlens) if t is not None}
    assert {t.data_ptr() for t in saved} == known


def test_text_that_follows_a_value_that_is_not_finite_does_not_see_it() -> None:
    documents = layout([2, 4], 3)
    x, weight, bias = random_inputs(9)
    assert x is not None
    clean, _ = KERNELS.packed(x, weight, bias, documents, None, False)
    x[3:5] = float("nan")
    y, _ = KERNELS.packed(x, weight, bias, documents, None, False)
    assert y[5:].equal(clean[5:])


def test_the_small_problem_of_the_self_test_is_solved(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in {"TOKENS": 32, "CHANNELS": 32}.items():
        monkeypatch.setattr(convolution_triton, name, size)
    assert CONVOLUTION._self_test(CONVOLUTION.backends["triton"], Task(DEVICE, torch.float32)) is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", [[8192], [1, 127, *[128] * 63]], ids=["one long text", "65 texts"])
def test_compiled_equals_torch(lengths: list[int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # with the blocks of a GPU
    documents = layout(lengths, 128)
    inputs = random_inputs(128 + sum(lengths), 3200, dtype=dtype)
    expected, actual, again = (
        with_gradients(lambda *xs, run=run: run.packed(*xs, documents, None, False), inputs)
        for run in (TWIN, KERNELS, KERNELS)
    )
    check(actual, expected, dtype)
    assert all(again[name].equal(tensor) for name, tensor in actual.items())

"""Products of a few rows equal those of torch, whatever the sizes, the other rows and the threads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hymba_tune.model import few_rows_native
from hymba_tune.model.backends import Operation, Task
from hymba_tune.model.cache import CACHE_NAME
from hymba_tune.model.few_rows import GATE_UP, LINEAR, gate_up, multiply, project
from hymba_tune.model.few_rows_native import LIBRARY, MOST_ROWS, native_gate_up, native_linear
from hymba_tune.model.head import HymbaHead
from hymba_tune.model.native import DTYPES
from tests.tiny import random_texts, tiny_model
from tests.tolerances import BFLOAT16, FLOAT32

WIDTHS = {"as_released": (132, 3200), "odd": (37, 101), "narrow": (5, 3), "whole_vectors": (64, 96)}


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the C++ for small weights too, or skip if there is no compiler; other tests cover this case."""
    if reason := LIBRARY.unavailable_reason():
        pytest.skip(reason)
    monkeypatch.setattr(few_rows_native, "LEAST_WEIGHTS", 0)
    for operation in (LINEAR, GATE_UP):
        monkeypatch.setattr(operation, "_choices", {})


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Divide the smallest work among two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr("hymba_tune.model.few_rows_native.threads_for", lambda _: 2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 11])
@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS.keys())
@pytest.mark.parametrize("operation", [LINEAR, GATE_UP], ids=["linear", "gate_up"])
def test_the_product_equals_that_of_torch(
    operation: Operation, widths: tuple[int, int], rows: int, dtype: torch.dtype
) -> None:
    task = Task("cpu", dtype, gradients=False, sizes=(*widths, rows))
    assert operation.choose(task).name == "native"
    problem = operation._problem(task)
    plain = operation.backends[operation.plain]
    for actual, expected in zip(problem.compute(operation.backends["native"]), problem.compute(plain), strict=True):
        (FLOAT32 if dtype == torch.float32 else BFLOAT16).check(actual, expected)


@pytest.mark.usefixtures("native")
def test_bfloat16_is_summed_in_float32() -> None:
    x, weight = torch.ones(1, 3000).bfloat16(), torch.ones(3, 3000).bfloat16()
    weight[:, 0] = 4096  # one is lost if it is added to this in bfloat16
    assert native_linear(x, weight, None, None)[0].tolist() == [7104.0] * 3


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS.keys())
def test_other_rows_and_threads_do_not_change_a_row(
    widths: tuple[int, int], dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    outputs, width = widths
    x, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((7, width), (outputs, width), (outputs,)))
    alone = [native_linear(row[None], weight, bias, None) for row in x]
    gated = [native_gate_up(row[None], weight, weight.flip(0)) for row in x]
    request.getfixturevalue("two_threads")
    for rows in range(1, 8):
        assert torch.equal(native_linear(x[:rows], weight, bias, None), torch.cat(alone[:rows]))
        assert torch.equal(native_gate_up(x[:rows], weight, weight.flip(0)), torch.cat(gated[:rows]))


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_may_be_columns_of_a_wider_matrix(dtype: torch.dtype) -> None:
    wide, weights = torch.randn(3, 50).to(dtype), torch.randn(9, 60).to(dtype)
    x, weight, residual = wide[:, 7:40], weights[:, 20:53], wide[:, 41:]
    expected = native_linear(x.contiguous(), weight.contiguous(), None, residual.contiguous())
    assert torch.equal(native_linear(x, weight, None, residual), expected)
    transposed = x.t().contiguous().t()
    assert torch.equal(native_linear(transposed, weight, None, residual), expected)


def test_torch_is_preferred_for_many_rows_and_for_small_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(*sizes: int) -> str | None:
        return few_rows_native.slower_reason(Task("cpu", torch.bfloat16, sizes=sizes))

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": False})
    assert reason(1600, 3200, MOST_ROWS) is None
    assert "more than 16 rows" in str(reason(1600, 3200, MOST_ROWS + 1))
    assert "fewer than 262,144 weights" in str(reason(100, 100, 1))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    assert reason(1600, 3200, 4) is None
    assert "more than 4 rows" in str(reason(1600, 3200, 5))


def test_a_residual_stream_is_added_with_and_without_a_bias() -> None:
    x, weight, bias, residual = torch.randn(2, 5), torch.randn(3, 5), torch.randn(3), torch.randn(2, 3)
    with torch.no_grad():
        for each in (None, bias):
            expected = nn.functional.linear(x, weight, each) + residual
            torch.testing.assert_close(multiply(x, weight, each, residual.clone()), expected)


class _Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def _hooked() -> nn.Module:
    layer = nn.Linear(6, 4)
    layer.register_forward_hook(lambda _, __, output: 2 * output)
    return layer


@pytest.mark.parametrize("make", [lambda: _Doubled(6, 4), _hooked], ids=["another_class", "a_hook"])
def test_a_layer_that_computes_more_than_its_product_is_called(make: Any) -> None:
    layer, x, residual = make(), torch.randn(2, 6), torch.randn(2, 4)
    with torch.no_grad():
        product = nn.functional.linear(x, layer.weight, layer.bias)
        torch.testing.assert_close(project(layer, x), 2 * product)
        torch.testing.assert_close(project(layer, x, residual.clone()), 2 * product + residual)


def test_gradients_reach_a_layer() -> None:
    layer = nn.Linear(6, 4)
    project(layer, torch.randn(2, 6)).sum().backward()
    assert layer.weight.grad is not None


@pytest.mark.usefixtures("native")
def test_a_decoded_token_computes_all_products_here(monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[tuple[int, ...]] = []
    call = few_rows_native._product

    def counted(x: Tensor, weight: Tensor, **others: Tensor | None) -> Tensor:
        computed.append(tuple(weight.shape))
        return call(x, weight, **others)

    monkeypatch.setattr(few_rows_native, "_product", counted)
    model = tiny_model().eval()
    ids = torch.stack(random_texts([3, 3]))
    with torch.no_grad():
        cache = model(ids, use_cache=True)[CACHE_NAME]
        computed.clear()
        model(ids[:, :1], **{CACHE_NAME: cache})
    layers = model.config.num_hidden_layers
    # The input, x's and output projection, the MLP's two, and one head.
    assert len(computed) == 5 * layers + 1


@pytest.mark.usefixtures("native")
def test_the_head_and_its_twin_agree() -> None:
    head, hidden = HymbaHead(12, 50, bias=False), torch.randn(2, 1, 12)
    with torch.no_grad():
        expected = nn.functional.linear(hidden, head.weight)
        torch.testing.assert_close(head(hidden), expected)
        torch.testing.assert_close(
            gate_up(hidden[:, 0], head.weight, head.weight),
            GATE_UP.backends["separate"].run(hidden[:, 0], head.weight, head.weight),
        )

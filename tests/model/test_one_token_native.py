"""The native operations of one new token of each text equal the plain ones, whatever the sizes and the threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from hymba_tune.model import elementwise_native
from hymba_tune.model.attention_token import ATTEND
from hymba_tune.model.backends import Operation, Task
from hymba_tune.model.native import DTYPES
from hymba_tune.model.one_token import PREPARE, UPDATE
from hymba_tune.model.one_token_native import LIBRARY, native_attend

CASES = {
    "prepare_as_released": (PREPARE, {"sizes": (25, 64, 5, 128, 3200, 4)}),
    "prepare_odd": (PREPARE, {"sizes": (9, 20, 1, 33, 70, 7)}),
    "prepare_without_earlier_inputs": (PREPARE, {"sizes": (4, 64, 2, 64, 16, 1)}),
    "attend_as_released": (ATTEND, {"heads": (25, 5), "widths": (64, 128)}),
    "attend_many_heads_of_a_key": (ATTEND, {"heads": (19, 1), "widths": (20, 33)}),
    "attend_a_head_of_a_key": (ATTEND, {"heads": (4, 4), "widths": (64, 64)}),
    "update_as_released": (UPDATE, {"sizes": (3200, 100, 16)}),
    "update_odd": (UPDATE, {"sizes": (70, 7, 5)}),
    "update_wide_state": (UPDATE, {"sizes": (16, 1, 33)}),
}

pytestmark = pytest.mark.usefixtures("native")


@pytest.fixture
def native() -> None:
    """Skip if there is no compiler; the tests of the other backends cover this case."""
    if reason := LIBRARY.unavailable_reason():
        pytest.skip(reason)


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Divide the smallest work among two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr("hymba_tune.model.one_token_native.threads_for", lambda _: 2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("operation", "sizes"), CASES.values(), ids=CASES.keys())
def test_the_operation_equals_the_plain_one(
    operation: Operation, sizes: dict[str, tuple[int, ...]], dtype: torch.dtype
) -> None:
    task = Task("cpu", dtype, gradients=False, **sizes)  # type: ignore[arg-type]
    assert operation.choose(task).name == "native"
    assert operation._self_test(operation.backends["native"], task) is None


@pytest.mark.parametrize(("operation", "sizes"), CASES.values(), ids=CASES.keys())
def test_threads_do_not_change_the_result(
    operation: Operation, sizes: dict[str, tuple[int, ...]], request: pytest.FixtureRequest
) -> None:
    problem = operation._problem(Task("cpu", torch.bfloat16, gradients=False, **sizes))  # type: ignore[arg-type]
    expected = problem.compute(operation.backends["native"])
    request.getfixturevalue("two_threads")
    for actual, one in zip(problem.compute(operation.backends["native"]), expected, strict=True):
        assert torch.equal(actual, one)


def test_long_texts_are_attended_in_parts() -> None:
    heads, groups, columns = 6, 2, 1500
    query = torch.randn(2, heads, 16)
    key, value = torch.randn(2, groups, columns, 16), torch.randn(2, groups, columns, 24)
    lengths = torch.tensor([1499, 4000])
    for window in (None, 1100):
        expected = ATTEND.backends["torch"].run(query, None, key, value, lengths, window)
        torch.testing.assert_close(native_attend(query, None, key, value, lengths, window), expected)


def test_a_buffer_that_cannot_be_written_in_place_is_refused() -> None:
    key, value = (torch.randn(8, 2, 3, 16).transpose(0, 1) for _ in range(2))
    with pytest.raises(RuntimeError, match="view"):
        native_attend(torch.randn(2, 8, 16), None, key, value, torch.tensor([1, 2]), None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_without_gradients_equal_those_with(dtype: torch.dtype) -> None:
    x, update, weight, other = (torch.randn(shape).to(dtype) for shape in ((3, 37), (3, 37), (37,), (37,)))

    def norms() -> tuple[torch.Tensor, ...]:
        added = elementwise_native.native_add_rms_norm(x, update, weight, 1e-6)
        mean = elementwise_native.native_mean_of_norms(x, weight, update, other, 1e-6)
        return *added, mean, elementwise_native.native_rms_norm(x, weight, 1e-6)

    expected = norms()
    with torch.no_grad():
        for actual, one in zip(norms(), expected, strict=True):
            assert actual.dtype is dtype
            torch.testing.assert_close(actual, one)

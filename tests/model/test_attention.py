"""Attention over packed texts against the naive twin on each text after the meta tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hymba_tune.model import attention_blocks, attention_native
from hymba_tune.model.attention import ATTENTION, packed_attention
from hymba_tune.model.attention_native import BLOCK, native_attention, native_unavailable_reason
from hymba_tune.model.backends import Backend, Task
from hymba_tune.model.documents import Documents, find_documents
from tests.model import attention_inputs
from tests.model.attention_inputs import naive, with_gradients
from tests.tolerances import BFLOAT16, FLOAT32, FLOAT32_GRADIENT, FLOAT64

LENGTHS = {
    "one_text_of_1": [1],
    "one_text_of_7": [7],
    "one_text_of_65": [65],
    "one_text_longer_than_two_blocks": [2 * attention_blocks.BLOCK + 3],
    "texts_of_1": [1, 1, 1],
    "texts_across_blocks": [1, 7, 65, 150, 1, 40],
    "a_text_a_block": [attention_blocks.BLOCK, attention_blocks.BLOCK],
}
WINDOWS = {"global": None, "window_of_0": 0, "window_of_1": 1, "window_of_20": 20, "window_beyond_all": 1000}
GROUPS, KEY, VALUE = 2, 4, 6


def documents(lengths: list[int], meta: int) -> Documents:
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return find_documents((1, sum(lengths)), torch.device("cpu"), num_meta=meta, cu_seqlens=offsets)


def random_inputs(rows: int, heads: int = 2 * GROUPS) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value, which are float64 leaves."""
    shapes = (rows, heads, KEY), (rows, GROUPS, KEY), (rows, GROUPS, VALUE)
    query, key, value = (torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes)
    return query, key, value


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS.keys())
@pytest.mark.parametrize("meta", [0, 1, 5])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_equals_naive_twin(lengths: list[int], meta: int, window: int | None) -> None:
    inputs = random_inputs(meta + sum(lengths))
    actual = with_gradients(inputs, packed_attention(*inputs, documents(lengths, meta), window))
    FLOAT64.check_all(actual, with_gradients(inputs, naive(*inputs, lengths, meta, window)))


@pytest.mark.parametrize("heads", [GROUPS, 3 * GROUPS])
def test_any_number_of_heads_per_group(heads: int) -> None:
    lengths = [9, 1, 30]
    inputs = random_inputs(5 + 40, heads)
    actual = with_gradients(inputs, packed_attention(*inputs, documents(lengths, 5), 7))
    FLOAT64.check_all(actual, with_gradients(inputs, naive(*inputs, lengths, 5, 7)))


def test_more_meta_tokens_than_a_block() -> None:
    meta = attention_blocks.BLOCK + 5
    lengths = [9, 20]
    inputs = random_inputs(meta + 29)
    actual = with_gradients(inputs, packed_attention(*inputs, documents(lengths, meta), 7))
    FLOAT64.check_all(actual, with_gradients(inputs, naive(*inputs, lengths, meta, 7)))


@pytest.mark.parametrize("window", [None, 1])
def test_gradcheck(monkeypatch: pytest.MonkeyPatch, window: int | None) -> None:
    monkeypatch.setattr(attention_blocks, "BLOCK", 2)
    layout = documents([3, 1, 2], 1)
    assert torch.autograd.gradcheck(lambda *tensors: packed_attention(*tensors, layout, window), random_inputs(7))


def test_float32_and_bfloat16_are_close_to_float64() -> None:
    lengths = LENGTHS["texts_across_blocks"]
    wide = tuple(x.detach().bfloat16().double().requires_grad_() for x in random_inputs(5 + sum(lengths)))
    expected = with_gradients(wide, naive(*wide, lengths, 5, 20))
    for dtype, close, close_gradient in (
        (torch.float32, FLOAT32, FLOAT32_GRADIENT),
        (torch.bfloat16, BFLOAT16, BFLOAT16),
    ):
        narrow = tuple(x.detach().to(dtype).requires_grad_() for x in wide)
        actual = with_gradients(narrow, packed_attention(*narrow, documents(lengths, 5), 20))
        for name, tensor in expected.items():
            assert actual[name].dtype == dtype
            (close if name == "output" else close_gradient).check(actual[name], tensor, name)


@pytest.fixture
def native() -> None:
    """Skip if native attention cannot run; attention is then computed in blocks, which the tests above cover."""
    if reason := native_unavailable_reason():
        pytest.skip(reason)


NATIVE_LENGTHS = LENGTHS | {"across_native_blocks": [BLOCK - 1, 2 * BLOCK + 1, 1]}


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS.keys())
@pytest.mark.parametrize("meta", [0, 1, 5, BLOCK + 5])
@pytest.mark.parametrize("lengths", NATIVE_LENGTHS.values(), ids=NATIVE_LENGTHS.keys())
def test_native_equals_naive_twin(lengths: list[int], meta: int, window: int | None, dtype: torch.dtype) -> None:
    wide = tuple(x.detach().to(dtype).double().requires_grad_() for x in random_inputs(meta + sum(lengths)))
    narrow = tuple(x.detach().to(dtype).requires_grad_() for x in wide)
    actual = with_gradients(narrow, native_attention(*narrow, documents(lengths, meta), window))
    expected = with_gradients(wide, naive(*wide, lengths, meta, window))
    for name, tensor in expected.items():
        assert actual[name].dtype == dtype
        close = BFLOAT16 if dtype == torch.bfloat16 else FLOAT32_GRADIENT
        close.check(actual[name], tensor, name)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize(("width", "value"), [(7, 13), (33, 40), (64, 128)])
def test_native_multiplies_bfloat16_of_any_width(width: int, value: int) -> None:
    lengths, meta = [45, 1, 38], 3
    inputs = attention_inputs.random_inputs(meta + sum(lengths), width=width, value=value)
    rounded = tuple(x.detach().bfloat16() for x in inputs)
    narrow = tuple(x.requires_grad_() for x in attention_inputs.strided(rounded))
    wide = tuple(x.double().requires_grad_() for x in rounded)
    actual = with_gradients(narrow, native_attention(*narrow, documents(lengths, meta), 20))
    BFLOAT16.check_all(actual, with_gradients(wide, naive(*wide, lengths, meta, 20)))


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_native_reads_columns_of_a_wider_matrix_on_any_number_of_threads(threads: int) -> None:
    lengths, meta, heads = [70, 1, 90], 3, 3 * GROUPS
    flat = torch.randn(meta + sum(lengths), heads * KEY + GROUPS * (KEY + VALUE) + 7)
    columns = flat.split([heads * KEY, GROUPS * KEY, GROUPS * VALUE, 7], -1)[:3]
    views = tuple(x.unflatten(-1, (-1, width)) for x, width in zip(columns, (KEY, KEY, VALUE), strict=True))
    leaves = tuple(x.detach().requires_grad_() for x in views)
    wide = tuple(x.detach().double().requires_grad_() for x in views)
    torch.set_num_threads(threads)
    try:
        actual = with_gradients(leaves, native_attention(*leaves, documents(lengths, meta), 20))
    finally:
        torch.set_num_threads(1)
    FLOAT32_GRADIENT.check_all(actual, with_gradients(wide, naive(*wide, lengths, meta, 20)))


@pytest.mark.usefixtures("native")
def test_native_saves_only_its_inputs_and_output() -> None:
    saved: list[Tensor] = []
    inputs = tuple(x.detach().float().requires_grad_() for x in random_inputs(50))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        output = native_attention(*inputs, documents([50], 0), 7)
    rows_and_heads = 50 * 2 * GROUPS
    assert sum(x.numel() for x in saved) == sum(x.numel() for x in inputs) + output.numel() + rows_and_heads


def test_native_without_mkl_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_native, "PRODUCTS", {torch.float32: "no_such_function", torch.bfloat16: "nor_this"})
    native_unavailable_reason.cache_clear()
    attention_native._product.cache_clear()
    try:
        assert native_unavailable_reason() == "this build of PyTorch contains no MKL"
    finally:
        native_unavailable_reason.cache_clear()
        attention_native._product.cache_clear()


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that is computed while the mode is active."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, operator: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        outputs = result if isinstance(result, tuple) else (result,)
        self.elements = max([self.elements, *(x.numel() for x in outputs if isinstance(x, Tensor))])
        return result


@pytest.mark.parametrize("lengths", [[1], [0.5, 0.25, 0.25], [0.01] * 100], ids=["one", "three", "a hundred"])
def test_tensors_of_a_windowed_layer_grow_linearly_with_the_tokens(lengths: list[float]) -> None:
    largest = []
    for tokens in (1000, 4000):
        inputs = random_inputs(5 + tokens)
        with LargestTensor() as mode:
            output = packed_attention(*inputs, documents([int(tokens * share) for share in lengths], 5), 64)
            output.sum().backward()
        largest.append(mode.elements)
    assert largest[1] <= 4.1 * largest[0]
    assert largest[1] < 4000 * 4000 / 16  # far fewer than a mask of all pairs would have


@pytest.mark.parametrize("gradients", [True, False])
def test_the_self_test_has_heads_widths_and_strides_of_the_model(gradients: bool) -> None:
    seen: list[Tensor] = []

    def spy(query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
        seen.extend((query, key, value))
        return query

    task = Task("cpu", torch.float32, gradients, heads=(6, 3), widths=(8, 16))
    ATTENTION._problem(task).compute(Backend("spy", spy))
    query, key, value = seen
    assert [x.shape[1:] for x in seen] == [(6, 8), (3, 8), (3, 16)]
    assert [x.requires_grad for x in seen] == [gradients] * 3
    assert (query.is_contiguous(), key.is_contiguous(), value.is_contiguous()) == (True, True, False)
    assert value.stride()[1:] == (16, 1)


def test_the_task_has_heads_and_widths_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks: list[Task] = []
    monkeypatch.setattr(ATTENTION, "compute", lambda task, *_: tasks.append(task))
    query, key, value = (torch.randn(9, heads, width) for heads, width in ((6, 8), (3, 8), (3, 16)))
    packed_attention(query, key, value, find_documents((1, 9), query.device, num_meta=0), None)
    assert (tasks[0].heads, tasks[0].widths) == ((6, 3), (8, 16))

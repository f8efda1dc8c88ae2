"""Attention of one new token of each text over a cache against a naive twin, its Triton kernel interpreted."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hymba_tune.model import attention_token_triton
from hymba_tune.model.attention_token import ATTEND, attend
from hymba_tune.model.attention_token_triton import _parts, triton_attend
from hymba_tune.model.triton_kernels import triton_unavailable_reason
from tests.tolerances import BFLOAT16, FLOAT32, Tolerance

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CPU = torch.device("cpu")
LENGTHS = [0, 8, 39, 90]
"""A first token, fewer tokens than a buffer, a full buffer, and one that has wrapped around."""
BACKENDS = ATTEND.backends
Inputs = tuple[Tensor, tuple[Tensor, Tensor] | None, Tensor, Tensor, Tensor]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Callable[..., Tensor]:
    chosen = BACKENDS[request.param]
    if reason := chosen.unavailable_reason():
        pytest.skip(reason)
    run: Callable[..., Tensor] = chosen.run
    return run


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Return a function that divides the keys of every text into a number of parts, in blocks of 16 keys."""
    monkeypatch.setattr(attention_token_triton, "KEYS", {2: 16, 4: 16})
    return lambda count: monkeypatch.setattr(attention_token_triton, "_parts", lambda *_: count)


def inputs_of(
    lengths: list[int],
    *,
    heads: tuple[int, int] = (6, 2),
    widths: tuple[int, int] = (16, 32),
    meta: int = 5,
    columns: int = 40,
    dtype: torch.dtype = torch.float32,
) -> Inputs:
    """Return query, keys and values of the meta tokens, buffers of keys and values, and lengths."""
    texts, (count, groups), (width, value_width) = len(lengths), heads, widths
    shapes = [(texts, count, width), (meta, groups, width), (meta, groups, value_width)]
    shapes += [(texts, groups, columns, width), (texts, groups, columns, value_width)]
    query, meta_key, meta_value, key, value = (torch.randn(shape).to(DEVICE, dtype) for shape in shapes)
    return query, (meta_key, meta_value) if meta else None, key, value, torch.tensor(lengths, device=DEVICE)


def naive(inputs: Inputs, window: int | None) -> Tensor:
    """Attend from each head of each text to the keys at the positions that it sees, in float64."""
    query, meta, key, value, lengths = inputs
    repeats = query.shape[1] // key.shape[1]
    outputs = []
    for text, length in enumerate(lengths.tolist()):
        first = max(0, length + 1 - key.shape[2], 0 if window is None else length - window)
        columns = [position % key.shape[2] for position in range(first, length + 1)]
        seen = [x[text][:, columns].transpose(0, 1) for x in (key, value)]
        if meta is not None:
            seen = [torch.cat(pair) for pair in zip(meta, seen, strict=True)]
        keys, values = (x.double().repeat_interleave(repeats, 1) for x in seen)
        scores = torch.einsum("ha,kha->hk", query[text].double() * query.shape[2] ** -0.5, keys)
        outputs.append(torch.einsum("hk,khv->hv", scores.softmax(-1), values).flatten())
    return torch.stack(outputs)


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize(("window", "columns"), [(None, 40), (12, 13), (12, 40)])
@pytest.mark.parametrize("meta", [0, 20])
def test_equals_naive_twin(
    backend: Callable[..., Tensor],
    parts: Callable[[int], None],
    meta: int,
    window: int | None,
    columns: int,
    count: int,
) -> None:
    parts(count)
    inputs = inputs_of(LENGTHS, meta=meta, columns=columns)
    FLOAT32.check(backend(*inputs, window), naive(inputs, window))


@pytest.mark.parametrize(("heads", "widths"), [((2, 2), (16, 16)), ((17, 1), (8, 24))])
def test_any_heads_and_widths(
    backend: Callable[..., Tensor], parts: Callable[[int], None], heads: tuple[int, int], widths: tuple[int, int]
) -> None:
    parts(2)
    inputs = inputs_of([30], heads=heads, widths=widths)
    FLOAT32.check(backend(*inputs, None), naive(inputs, None))


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        (name, dtype)
        for name, backend in BACKENDS.items()
        for dtype in (torch.bfloat16, torch.float16)
        if backend.dtypes is None or dtype in backend.dtypes
    ],
    indirect=["backend"],
)
def test_narrow_dtypes(
    backend: Callable[..., Tensor], parts: Callable[[int], None], dtype: torch.dtype, count: int
) -> None:
    parts(count)
    inputs = inputs_of([7, 90], dtype=dtype)
    output = backend(*inputs, 20)
    assert output.dtype == dtype
    BFLOAT16.check(output, naive(inputs, 20))


def test_queries_and_buffers_may_be_parts_of_wider_tensors(
    backend: Callable[..., Tensor], parts: Callable[[int], None]
) -> None:
    parts(1)
    query, meta, key, value, lengths = inputs_of([30, 7])
    assert meta is not None
    wide = torch.cat([query.flatten(1), torch.randn(2, 7, device=DEVICE)], 1)[:, : query[0].numel()].view_as(query)
    narrowed = [torch.cat([x, x], 2)[:, :, : x.shape[2]] for x in (key, value)]
    heads_first = tuple(x.transpose(0, 1).contiguous().transpose(0, 1) for x in meta)
    expected = backend(query, meta, key, value, lengths, 20)
    assert backend(wide, heads_first, *narrowed, lengths, 20).equal(expected)
    transposed = [x.mT.contiguous().mT for x in (query, key, value)]
    FLOAT32.check(backend(transposed[0], meta, *transposed[1:], lengths, 20), expected)


@pytest.mark.parametrize("count", [1, 4])
def test_the_result_is_deterministic_and_does_not_depend_on_other_texts(
    parts: Callable[[int], None], count: int
) -> None:
    if reason := triton_unavailable_reason():
        pytest.skip(reason)
    parts(count)
    query, meta, key, value, lengths = inputs_of([30, 90])
    both = triton_attend(query, meta, key, value, lengths, None)
    assert triton_attend(query, meta, key, value, lengths, None).equal(both)
    assert triton_attend(query[1:], meta, key[1:], value[1:], lengths[1:], None).equal(both[1:])


def test_columns_that_no_token_of_the_text_is_in_are_not_read(
    backend: Callable[..., Tensor], parts: Callable[[int], None]
) -> None:
    parts(4)
    query, meta, key, value, lengths = inputs_of([12])
    expected = backend(query, meta, key, value, lengths, None)
    key[:, :, 13:] = 1e4
    value[:, :, 13:] = 1e4
    assert backend(query, meta, key, value, lengths, None).equal(expected)


def test_keys_that_autocast_has_widened() -> None:
    query, meta, key, value, lengths = inputs_of([12])
    assert meta is not None
    narrow = meta[0], meta[1].bfloat16()
    output = attend(query, narrow, key, value.bfloat16(), lengths, None)
    assert output.dtype == torch.bfloat16
    BFLOAT16.check(output, naive((query, meta, key, value, lengths), None))


def test_keys_and_values_of_two_dtypes_without_meta_tokens(backend: Callable[..., Tensor]) -> None:
    query, _, key, value, lengths = inputs_of([12], meta=0)
    output = backend(query, None, key, value.bfloat16(), lengths, None)
    BFLOAT16.check(output, naive((query, None, key, value, lengths), None))


@pytest.mark.parametrize(
    ("pairs", "blocks", "parts"),
    [(5, 130, 32), (5, 3, 1), (5, 18, 8), (20, 130, 8), (640, 130, 1), (1, 4096, 64)],
    ids=["one long text", "a short text", "a window", "four texts", "many texts", "one very long text"],
)
def test_a_gpu_is_filled_without_parts_of_a_few_keys(
    monkeypatch: pytest.MonkeyPatch, pairs: int, blocks: int, parts: int
) -> None:
    monkeypatch.setattr(attention_token_triton, "_multiprocessors", lambda _: 108)
    assert _parts(pairs, blocks, CPU) == parts


@pytest.mark.gpu
@pytest.mark.parametrize("texts", [1, 64])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, FLOAT32), (torch.bfloat16, BFLOAT16)])
def test_compiled_equals_naive_twin(dtype: torch.dtype, close: Tolerance, texts: int) -> None:
    lengths = [(8191 * text) // texts + 100 for text in range(texts)]
    inputs = inputs_of(lengths, heads=(25, 5), widths=(64, 128), meta=128, columns=8192, dtype=dtype)
    for window in (None, 1024):
        close.check(triton_attend(*inputs, window).cpu(), naive(inputs, window).cpu())

"""The attention backends sdpa, flex and flash against the naive twin on each text."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import create_mask, flex_attention

from hymba_tune.model import attention_flash, attention_flex
from hymba_tune.model.attention_flash import flash_attention, flash_unavailable_reason, flash_unsupported_reason
from hymba_tune.model.attention_flex import (
    block_mask,
    flex_packed_attention,
    flex_unavailable_reason,
    flex_unsupported_reason,
)
from hymba_tune.model.attention_sdpa import sdpa_attention
from hymba_tune.model.backends import Task
from hymba_tune.model.documents import Documents, find_documents
from tests.model.attention_inputs import naive, with_gradients
from tests.reference import fake_kernels
from tests.tolerances import BFLOAT16, FLOAT32, FLOAT64

CPU = torch.device("cpu")
CACHED = flash_unavailable_reason, flex_unavailable_reason, attention_flash._provider, attention_flash._parts
"""Functions whose results are cached for the process."""
LENGTHS = {
    "one_text_of_1": [1],
    "one_text_of_65": [65],
    "short_texts": [1, 1, 7, 65, 20, 1],
    "texts_across_blocks": [1, 150, 130, 1, 40],
}
WINDOWS = {"global": None, "window_of_0": 0, "window_of_1": 1, "window_of_20": 20, "window_beyond_all": 1000}
any_layout = pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
any_window = pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS.keys())
any_meta = pytest.mark.parametrize("meta", [0, 5])
MORE_THAN_A_BLOCK = 130


@pytest.fixture(autouse=True)
def _clear_caches() -> Iterator[None]:
    for function in CACHED:
        function.cache_clear()
    yield
    for function in CACHED:
        function.cache_clear()


def documents(lengths: list[int], meta: int, device: str = "cpu") -> Documents:
    offsets = torch.tensor([0, *lengths], device=device).cumsum(0)
    return find_documents((1, sum(lengths)), offsets.device, num_meta=meta, cu_seqlens=offsets)


def random_inputs(rows: int, heads: int = 6, groups: int = 2, width: int = 8, value: int = 16) -> tuple[Tensor, ...]:
    """Return query, key and value, which are float64 leaves."""
    shapes = (rows, heads, width), (rows, groups, width), (rows, groups, value)
    return tuple(torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes)


def strided(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the inputs as columns of one wide matrix, like the outputs of a projection."""
    columns = torch.cat([x.flatten(1) for x in inputs], 1).split([x[0].numel() for x in inputs], 1)
    return tuple(part.unflatten(1, x.shape[1:]) for part, x in zip(columns, inputs, strict=True))


# ---- sdpa


@any_window
@any_meta
@any_layout
def test_sdpa_equals_naive_twin(lengths: list[int], meta: int, window: int | None) -> None:
    inputs = random_inputs(meta + sum(lengths))
    actual = with_gradients(inputs, sdpa_attention(*strided(inputs), documents(lengths, meta), window))
    FLOAT64.check_all(actual, with_gradients(inputs, naive(*inputs, lengths, meta, window)))


@pytest.mark.parametrize(("heads", "meta"), [(2, 5), (6, 30)])
def test_sdpa_supports_one_head_per_group_and_more_meta_tokens_than_text(heads: int, meta: int) -> None:
    inputs = random_inputs(meta + 20, heads=heads)
    actual = with_gradients(inputs, sdpa_attention(*inputs, documents([9, 1, 10], meta), 7))
    FLOAT64.check_all(actual, with_gradients(inputs, naive(*inputs, [9, 1, 10], meta, 7)))


# ---- flash


@pytest.fixture
def flash(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Use a provider, by default PyTorch's, with the calls of a GPU and an implementation in plain torch."""
    library = None
    name = getattr(request, "param", "pytorch")
    if name == "flash_attn_3":
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
        monkeypatch.setitem(sys.modules, "flash_attn_interface", ModuleType("flash_attn_interface"))
        library = fake_kernels.register_flash_attn_3()
        find = attention_flash._flash_attn_3
    elif name == "flash_attn_4":
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
        for module in fake_kernels.flash_attn_4_modules():
            monkeypatch.setitem(sys.modules, module.__name__, module)
        find = attention_flash._flash_attn_4
    elif name == "flash_attn_2":
        for module in fake_kernels.flash_attn_modules():
            monkeypatch.setitem(sys.modules, module.__name__, module)
        find = attention_flash._flash_attn_2
    elif name == "hub":
        package, interface = fake_kernels.flash_attn_modules()
        package.flash_attn_interface = interface
        monkeypatch.setattr(attention_flash, "hub_kernel", {"flash-attn2": package}.get)
        find = attention_flash._of_hub
    else:
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
        library = fake_kernels.register_aten()
        find = attention_flash._of_pytorch
    provider = find()
    assert provider is not None
    monkeypatch.setattr(attention_flash, "_provider", lambda: provider)
    monkeypatch.setattr(attention_flash, "SHARED", 50)  # so that several runs share the meta keys
    yield
    if library is not None:
        library._destroy()


@pytest.mark.usefixtures("flash")
@any_window
@any_meta
@any_layout
def test_flash_equals_naive_twin(lengths: list[int], meta: int, window: int | None) -> None:
    inputs = random_inputs(meta + sum(lengths))
    actual = with_gradients(inputs, flash_attention(*strided(inputs), documents(lengths, meta), window))
    FLOAT64.check_all(actual, with_gradients(inputs, naive(*inputs, lengths, meta, window)))


@pytest.mark.parametrize("flash", ["flash_attn_4", "flash_attn_3", "flash_attn_2", "hub", "pytorch"], indirect=True)
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.usefixtures("flash")
def test_flash_equals_naive_twin_with_every_provider(window: int | None) -> None:
    inputs = random_inputs(75)
    actual = with_gradients(inputs, flash_attention(*strided(inputs), documents([9, 1, 60], 5), window))
    FLOAT64.check_all(actual, with_gradients(inputs, naive(*inputs, [9, 1, 60], 5, window)))


@pytest.mark.usefixtures("flash")
@pytest.mark.parametrize(("heads", "value"), [(2, 8), (6, 8), (2, 24)])
def test_flash_supports_any_number_of_heads_per_group_and_wider_values(heads: int, value: int) -> None:
    inputs = random_inputs(45, heads=heads, value=value)
    actual = with_gradients(inputs, flash_attention(*inputs, documents([9, 1, 30], 5), 7))
    FLOAT64.check_all(actual, with_gradients(inputs, naive(*inputs, [9, 1, 30], 5, 7)))


@pytest.mark.usefixtures("flash")
@pytest.mark.parametrize("attend", [sdpa_attention, flash_attention])
def test_bfloat16_is_close_to_float64(attend: Callable[..., Tensor]) -> None:
    wide = tuple(x.detach().bfloat16().double().requires_grad_() for x in random_inputs(145))
    narrow = tuple(x.detach().bfloat16().requires_grad_() for x in wide)
    actual = with_gradients(narrow, attend(*narrow, documents([109, 1, 30], 5), 20))
    assert {x.dtype for x in actual.values()} == {torch.bfloat16}
    BFLOAT16.check_all(actual, with_gradients(wide, naive(*wide, [109, 1, 30], 5, 20)))


@pytest.mark.usefixtures("flash")
def test_flash_copies_tensors_that_its_kernels_cannot_read() -> None:
    inputs = random_inputs(45)
    shifted = [torch.nn.functional.pad(x.detach(), (1, 0))[..., 1:] for x in inputs]
    output = flash_attention(*shifted, documents([9, 1, 30], 5), 7)
    FLOAT64.check(output, naive(*inputs, [9, 1, 30], 5, 7))


def test_flash_parts_omit_empty_texts() -> None:
    within_texts, _, texts_to_meta = attention_flash._parts((0, 3, 3, 7), 5, None, CPU)
    assert within_texts.runs.cu_q.tolist() == [0, 3, 7]
    assert texts_to_meta.runs.cu_q.tolist() == [0, 7]


@pytest.mark.parametrize(
    ("available", "capability", "reason"),
    [(False, (9, 0), "no CUDA device"), (True, (7, 5), "capability 8.0"), (True, (8, 0), "pip install flash-attn")],
)
def test_flash_gives_the_reason_if_it_is_unavailable(
    monkeypatch: pytest.MonkeyPatch, available: bool, capability: tuple[int, int], reason: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(attention_flash, "PROVIDERS", [lambda: None])
    assert reason in str(flash_unavailable_reason())


@pytest.mark.usefixtures("flash")
def test_flash_is_available_if_there_is_a_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert flash_unavailable_reason() is None


@pytest.mark.usefixtures("flash")
def test_flash_supports_an_expanded_gradient() -> None:
    inputs = random_inputs(45)
    outputs = flash_attention(*inputs, documents([9, 1, 30], 5), 7), naive(*inputs, [9, 1, 30], 5, 7)
    for actual, expected in zip(*(torch.autograd.grad(output.sum(), inputs) for output in outputs), strict=True):
        FLOAT64.check(actual, expected)


def test_flash_is_not_found_if_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    for name in ("flash_attn_interface", "flash_attn.flash_attn_interface", "flash_attn.cute", "flash_attn"):
        monkeypatch.setitem(sys.modules, name, None)
    assert [find() for find in attention_flash.PROVIDERS] == [None] * len(attention_flash.PROVIDERS)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert attention_flash._flash_attn_3() is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    assert attention_flash._flash_attn_4() is None


@pytest.mark.parametrize(
    ("widths", "reason"),
    [((64, 128), None), ((64, 64), None), ((20, 40), "multiple of 8"), ((264, 264), "256"), ((64, 96), "of 64")],
)
def test_flash_gives_the_reason_for_unsupported_widths(widths: tuple[int, int], reason: str | None) -> None:
    actual = flash_unsupported_reason(Task("cuda", torch.bfloat16, widths=widths))
    assert actual is None if reason is None else reason in str(actual)


# ---- flex


@pytest.fixture
def _uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_flex, "_compiled", lambda: flex_attention)


def visible_pairs(lengths: list[int], meta: int, window: int | None) -> Tensor:
    """Return the ``(rows, rows)`` pairs that are visible by the definition of the mask."""
    texts = torch.tensor([0] * meta + [i + 1 for i, length in enumerate(lengths) for _ in range(length)])
    i, j = torch.arange(len(texts))[:, None], torch.arange(len(texts))
    own = (texts[:, None] == texts) & ((texts == 0) | (i - j <= (len(texts) if window is None else window)))
    return (j <= i) & ((j < meta) | own)


@any_window
@pytest.mark.parametrize("meta", [0, 5, MORE_THAN_A_BLOCK])
@any_layout
def test_flex_mask_follows_the_definition(lengths: list[int], meta: int, window: int | None) -> None:
    rows = meta + sum(lengths)
    mask = block_mask(documents(lengths, meta).starts, meta, window, CPU)
    visible = visible_pairs(lengths, meta, window)
    assert torch.equal(create_mask(mask.mask_mod, 1, 1, rows, rows, device="cpu")[0, 0], visible)


@any_window
@pytest.mark.parametrize("meta", [0, 5, MORE_THAN_A_BLOCK])
@any_layout
def test_flex_blocks_are_those_with_visible_pairs(lengths: list[int], meta: int, window: int | None) -> None:
    mask = block_mask(documents(lengths, meta).starts, meta, window, CPU)
    visible = visible_pairs(lengths, meta, window)
    beyond = -len(visible) % attention_flex.BLOCK
    count = (len(visible) + beyond) // attention_flex.BLOCK

    def blocks(pairs: Tensor) -> Tensor:
        return pairs.unflatten(0, (count, -1)).unflatten(-1, (count, -1)).transpose(1, 2).flatten(2)

    padded = torch.nn.functional.pad(visible, (0, beyond))
    some, all_rows = (torch.nn.functional.pad(padded, (0, 0, 0, beyond), value=rest) for rest in (False, True))
    assert torch.equal(mask.to_dense()[0, 0].bool(), blocks(some).any(-1))
    whole = torch.zeros(count, count, dtype=torch.bool)
    for row, number in enumerate(mask.full_kv_num_blocks[0, 0].tolist()):
        whole[row, mask.full_kv_indices[0, 0, row, :number].long()] = True
    assert torch.equal(whole, blocks(all_rows).all(-1))


def test_flex_blocks_of_a_window_grow_linearly() -> None:
    numbers = []
    for tokens in (2**13, 2**14, 2**15):
        mask = block_mask((0, tokens), 128, 1024, CPU)
        numbers.append(int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum()))
    assert numbers[2] - numbers[1] == 2 * (numbers[1] - numbers[0])


def test_flex_masks_are_shared_by_layers_and_steps() -> None:
    first = block_mask(documents([9, 30], 5).starts, 5, 7, CPU)
    assert block_mask(documents([9, 30], 5).starts, 5, 7, CPU) is first
    assert block_mask(documents([9, 31], 5).starts, 5, 7, CPU) is not first


def test_flex_masks_made_during_evaluation_can_be_used_in_training() -> None:
    attention_flex.block_mask.cache_clear()
    with torch.inference_mode():
        mask = block_mask((0, 9), 5, 7, CPU)
    assert not mask.kv_indices.is_inference()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.usefixtures("_uncompiled")
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("meta", [0, MORE_THAN_A_BLOCK])
@any_layout
def test_flex_equals_naive_twin(lengths: list[int], meta: int, window: int | None) -> None:
    inputs = tuple(x.detach() for x in random_inputs(meta + sum(lengths)))
    output = flex_packed_attention(*strided(inputs), documents(lengths, meta), window)
    FLOAT64.check(output, naive(*inputs, lengths, meta, window))


def test_flex_compiles_once_for_all_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = CompileCounter()
    compiled = torch.compile(flex_attention, dynamic=True, backend=counter)
    monkeypatch.setattr(attention_flex, "_compiled", lambda: compiled)
    for lengths, meta, window in (([300, 20, 100], 5, None), ([300, 21], 5, 20), ([900, 1, 1], 130, 40), ([600], 5, 1)):
        inputs = tuple(x.detach() for x in random_inputs(meta + sum(lengths)))
        FLOAT64.check(
            flex_packed_attention(*inputs, documents(lengths, meta), window),
            naive(*inputs, lengths, meta, window),
        )
    assert counter.frame_count == 1
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("dtype", "width", "value", "chosen"),
    [
        (torch.bfloat16, 64, 128, True),
        (torch.bfloat16, 64, 64, False),
        (torch.bfloat16, 128, 128, False),
        (torch.float32, 64, 128, False),
    ],
)
def test_flex_tiles_are_chosen_for_values_wider_than_queries(
    dtype: torch.dtype, width: int, value: int, chosen: bool
) -> None:
    query, values = torch.empty(1, 1, width, dtype=dtype), torch.empty(1, 1, value, dtype=dtype)
    assert bool(attention_flex._tiles(query, values)) == chosen


@pytest.mark.parametrize(
    ("available", "capability", "triton", "reason"),
    [
        (False, (9, 0), True, "no CUDA device"),
        (True, (7, 5), True, "capability 8.0"),
        (True, (8, 0), False, "pip install triton"),
        (True, (8, 0), True, None),
    ],
)
def test_flex_gives_the_reason_if_it_is_unavailable(
    monkeypatch: pytest.MonkeyPatch, available: bool, capability: tuple[int, int], triton: bool, reason: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setitem(sys.modules, "triton", ModuleType("triton") if triton else None)
    assert flex_unavailable_reason() is None if reason is None else reason in str(flex_unavailable_reason())


def test_flex_gives_the_reason_for_unsupported_widths() -> None:
    assert flex_unsupported_reason(Task("cuda", torch.bfloat16, widths=(16, 24))) is None
    assert "at least 16 wide; they are 8" in str(flex_unsupported_reason(Task("cuda", torch.bfloat16, widths=(8, 16))))


# ---- on a GPU


@pytest.mark.gpu
@any_window
@pytest.mark.parametrize("meta", [0, MORE_THAN_A_BLOCK])
@any_layout
@pytest.mark.parametrize(
    ("attend", "unavailable_reason", "dtype"),
    [
        (sdpa_attention, None, torch.float32),
        (sdpa_attention, None, torch.bfloat16),
        (flex_packed_attention, flex_unavailable_reason, torch.float32),
        (flex_packed_attention, flex_unavailable_reason, torch.bfloat16),
        (flash_attention, flash_unavailable_reason, torch.bfloat16),
    ],
)
def test_on_cuda_equals_naive_twin(
    attend: Callable[..., Tensor],
    unavailable_reason: Callable[[], str | None] | None,
    dtype: torch.dtype,
    lengths: list[int],
    meta: int,
    window: int | None,
) -> None:
    if unavailable_reason is not None:
        assert unavailable_reason() is None
    wide = tuple(
        x.detach().to(dtype).double().requires_grad_()
        for x in random_inputs(meta + sum(lengths), heads=10, width=64, value=128)
    )
    expected = with_gradients(wide, naive(*wide, lengths, meta, window))
    narrow = tuple(x.detach().to("cuda", dtype).requires_grad_() for x in wide)
    output = attend(*strided(narrow), documents(lengths, meta, "cuda"), window)
    actual = {name: x.cpu() for name, x in with_gradients(narrow, output).items()}
    close = FLOAT32 if dtype == torch.float32 else BFLOAT16
    close.check_all(actual, expected)

"""The attention backends sdpa, flex and flash against the naive twin on each text."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

from hymba_tune.model import attention_flash
from hymba_tune.model.attention_flash import flash_attention, flash_unavailable_reason, flash_unsupported_reason
from hymba_tune.model.attention_flex import flex_packed_attention, flex_unavailable_reason
from hymba_tune.model.attention_sdpa import sdpa_attention
from hymba_tune.model.backends import Task
from tests.model.attention_inputs import (
    MORE_THAN_A_BLOCK,
    any_layout,
    any_meta,
    any_window,
    documents,
    naive,
    random_inputs,
    strided,
    with_gradients,
)
from tests.reference import fake_kernels
from tests.tolerances import BFLOAT16, FLOAT32, FLOAT64

CPU = torch.device("cpu")
CACHED = flash_unavailable_reason, flex_unavailable_reason, attention_flash._provider, attention_flash._parts
"""Functions whose results are cached for the process."""


@pytest.fixture(autouse=True)
def _clear_caches() -> Iterator[None]:
    for function in CACHED:
        function.cache_clear()
    yield
    for function in CACHED:
        function.cache_clear()


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
    monkeypatch.setattr(attention_flash, "_provider", lambda *_, **__: provider)
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
    [
        (False, (9, 0), "no CUDA device"),
        (True, (7, 5), "capability 8.0"),
        (True, (8, 0), "hymba-tune[flash]"),
    ],
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


@pytest.mark.parametrize(("gradients", "first"), [(True, "flash-attn 4"), (False, "PyTorch")])
def test_flash_is_not_compiled_before_the_first_token(
    monkeypatch: pytest.MonkeyPatch, gradients: bool, first: str
) -> None:
    found = [lambda name=name: attention_flash.Provider(name, None, None) for name in ("flash-attn 4", "PyTorch")]
    monkeypatch.setattr(attention_flash, "PROVIDERS", found)
    monkeypatch.setattr(attention_flash, "COMPILED_AT_FIRST", found[:1])
    assert attention_flash._provider(gradients).name == first


@pytest.mark.parametrize(
    ("capability", "deterministic", "found"),
    [((9, 0), False, False), ((10, 0), True, True), ((12, 0), False, True), ((12, 1), True, False)],
)
def test_flash_attn_4_is_used_where_it_can_train(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], deterministic: bool, found: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    for module in fake_kernels.flash_attn_4_modules():
        monkeypatch.setitem(sys.modules, module.__name__, module)
    assert (attention_flash._flash_attn_4() is not None) == found


def test_kernels_for_nvidia_are_not_used_on_amd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (11, 0))  # of gfx1100
    for module in fake_kernels.flash_attn_4_modules():
        monkeypatch.setitem(sys.modules, module.__name__, module)
    assert attention_flash._flash_attn_4() is None


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

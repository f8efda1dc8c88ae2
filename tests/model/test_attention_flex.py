"""FlexAttention's masks and compilations, without a GPU, and its results against the naive twin on each text."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import create_mask, flex_attention

from hymba_tune.model import attention_flex
from hymba_tune.model.attention_flex import (
    block_mask,
    flex_packed_attention,
    flex_unavailable_reason,
    flex_unsupported_reason,
)
from hymba_tune.model.backends import Task
from tests.model.attention_inputs import (
    MORE_THAN_A_BLOCK,
    any_layout,
    any_window,
    documents,
    naive,
    random_inputs,
    strided,
)
from tests.tolerances import FLOAT32, FLOAT64

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _clear_caches() -> Iterator[None]:
    flex_unavailable_reason.cache_clear()
    yield
    flex_unavailable_reason.cache_clear()


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
    count = max(2, -(-len(visible) // attention_flex.BLOCK))
    beyond = count * attention_flex.BLOCK - len(visible)

    def blocks(pairs: Tensor) -> Tensor:
        return pairs.unflatten(0, (count, -1)).unflatten(-1, (count, -1)).transpose(1, 2).flatten(2)

    padded = torch.nn.functional.pad(visible, (0, beyond))
    some, all_rows = (torch.nn.functional.pad(padded, (0, 0, 0, beyond), value=rest) for rest in (False, True))
    assert torch.equal(mask.to_dense()[0, 0].bool(), blocks(some).any(-1))
    whole = torch.zeros(count, count, dtype=torch.bool)
    for row, number in enumerate(mask.full_kv_num_blocks[0, 0].tolist()):
        whole[row, mask.full_kv_indices[0, 0, row, :number].long()] = True
    has_rows = torch.arange(count)[:, None] * attention_flex.BLOCK < len(visible)
    assert torch.equal(whole, blocks(all_rows).all(-1) & has_rows)


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


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompileCounter]:
    """Compile FlexAttention without Triton, and count how often."""
    counter = CompileCounter()
    compiled = torch.compile(attention_flex._only_compiled, dynamic=True, backend=counter)
    monkeypatch.setattr(attention_flex, "_compiled", lambda: compiled)
    torch.compiler.reset()
    yield counter
    torch.compiler.reset()


def test_flex_compiles_once_for_all_layouts(compilations: CompileCounter) -> None:
    layouts = ([300, 20, 100], 5, None), ([300, 21], 5, 20), ([900, 1, 1], 130, 40), ([600], 5, 1), ([30, 7], 5, None)
    for lengths, meta, window in layouts:
        inputs = tuple(x.detach() for x in random_inputs(meta + sum(lengths)))
        output = flex_packed_attention(*inputs, documents(lengths, meta), window)
        FLOAT64.check(output, naive(*inputs, lengths, meta, window))
    assert compilations.frame_count == 1


def test_flex_compiles_once_for_all_strides_and_under_autocast(compilations: CompileCounter) -> None:
    inputs = tuple(x.detach().float() for x in random_inputs(35))
    for given in (inputs, strided(inputs)):
        for autocast in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                output = flex_packed_attention(*given, documents([9, 1, 20], 5), 7)
            FLOAT32.check(output, naive(*inputs, [9, 1, 20], 5, 7))
    assert compilations.frame_count == 1


def test_flex_compiles_more_often_than_torch_compile_does_by_itself(compilations: CompileCounter) -> None:
    with torch._dynamo.config.patch(recompile_limit=1):
        for width in (16, 24):
            inputs = tuple(x.detach() for x in random_inputs(9, width=width))
            flex_packed_attention(*inputs, documents([9], 0), None)
        assert torch._dynamo.config.recompile_limit == 1
    assert compilations.frame_count == 2


@pytest.mark.usefixtures("compilations")
def test_flex_fails_past_the_limit_rather_than_run_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_flex, "RECOMPILE_LIMIT", 1)
    narrow, wide = (tuple(x.detach() for x in random_inputs(9, width=width)) for width in (16, 24))
    with torch._dynamo.config.patch(recompile_limit=1):
        flex_packed_attention(*narrow, documents([9], 0), None)
        with pytest.raises(RuntimeError, match="past its limit of 1 recompilations"):
            flex_packed_attention(*wide, documents([9], 0), None)


@pytest.mark.usefixtures("compilations")
def test_flex_fails_where_compilation_is_switched_off() -> None:
    inputs = tuple(x.detach() for x in random_inputs(9))
    with torch.compiler.set_stance("force_eager"), pytest.raises(RuntimeError, match="it is switched off"):
        flex_packed_attention(*inputs, documents([9], 0), None)


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

"""The selective scan of many texts against the naive twin on each: outputs, final states and all gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import hymba_tune.model.scan_torch as scan_torch
from hymba_tune.model.scan import selective_scan
from hymba_tune.model.scan_native import LIBRARY
from tests.model.scan_inputs import WITHOUT, naive, random_inputs, with_gradients
from tests.tolerances import BFLOAT16, FLOAT32, FLOAT32_GRADIENT, FLOAT64

LENGTHS = {
    "one_text_of_1": [1],
    "one_text_of_7": [7],
    "one_text_of_65": [65],
    "texts_of_1": [1, 1, 1],
    "many_texts": [1, 7, 65, 1, 16, 17, 33],
}


def scan(inputs: dict[str, Tensor], lengths: list[int], backend: str = "auto") -> tuple[Tensor, Tensor]:
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    tensors = {name: x for name, x in inputs.items() if name != "initial"}
    return selective_scan(**tensors, initial_state=inputs.get("initial"), cu_seqlens=offsets, backend=backend)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("without", WITHOUT.values(), ids=WITHOUT.keys())
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_equals_naive_twin(lengths: list[int], without: tuple[str, ...], backend: str) -> None:
    inputs = random_inputs(lengths, without=without)
    actual = with_gradients(inputs, scan(inputs, lengths, backend))
    FLOAT64.check_all(actual, with_gradients(inputs, naive(inputs, lengths)))


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_one_initial_state_for_every_text(backend: str) -> None:
    lengths = [5, 1, 18]
    inputs = random_inputs(lengths, shared=True)
    actual = with_gradients(inputs, scan(inputs, lengths, backend))
    FLOAT64.check_all(actual, with_gradients(inputs, naive(inputs, lengths)))


@pytest.mark.parametrize("backend", ["auto", "native", "torch", "reference"])
def test_float32_is_close_to_float64(backend: str) -> None:
    if (
        backend == "native" and LIBRARY.unavailable_reason()
    ):  # `doctor` gives the reason; "auto" then selects another backend
        backend = "auto"
    lengths = LENGTHS["many_texts"]
    wide = random_inputs(lengths)
    narrow = {name: x.detach().float().requires_grad_() for name, x in wide.items()}
    actual = with_gradients(narrow, scan(narrow, lengths, backend))
    expected = with_gradients(wide, naive(wide, lengths))
    for name, tensor in expected.items():
        (FLOAT32 if name in ("y", "final state") else FLOAT32_GRADIENT).check(actual[name], tensor, name)


@pytest.mark.parametrize("backend", ["auto", "reference", "torch"])
def test_bfloat16_has_a_float32_state(backend: str) -> None:
    lengths = LENGTHS["many_texts"]
    inputs = {name: x.detach().bfloat16() for name, x in random_inputs(lengths).items()}
    expected = naive({name: x.double() for name, x in inputs.items()}, lengths)
    y, final = scan(inputs, lengths, backend)
    assert y.dtype == torch.bfloat16
    assert final.dtype == torch.float32
    BFLOAT16.check(y, expected[0], "y")
    FLOAT32.check(final, expected[1], "final state")


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradcheck(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_torch, "CHUNK", 2)
    lengths = [3, 1, 5]
    inputs = random_inputs(lengths)
    assert torch.autograd.gradcheck(
        lambda *tensors: scan(dict(zip(inputs, tensors, strict=True)), lengths, backend), tuple(inputs.values())
    )


def test_texts_continue_from_their_final_states() -> None:
    lengths = [20, 3]
    inputs = random_inputs(lengths)
    y, final = scan(inputs, lengths)
    first = [torch.arange(11), torch.arange(20, 22)]
    rest = [torch.arange(11, 20), torch.arange(22, 23)]
    state = inputs["initial"]
    parts = []
    for rows in (first, rest):
        selected = {name: x[torch.cat(rows)] if len(x) == 23 else x for name, x in inputs.items()}
        part, state = scan(selected | {"initial": state}, [len(row) for row in rows])
        parts.append(part)
    FLOAT64.check(torch.cat(parts)[torch.cat([*first, *rest]).argsort()], y)
    FLOAT64.check(state, final)


def test_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="scan backend 'cuda'; expected one of auto, native"):
        scan(random_inputs([3]), [3], "cuda")

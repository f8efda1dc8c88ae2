"""The chunked cross-entropy against that of PyTorch on all logits at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from hymba_tune.model import loss
from hymba_tune.model.loss import linear_cross_entropy
from tests.tolerances import BFLOAT16, FLOAT32, FLOAT32_GRADIENT, FLOAT64

WIDTH, VOCABULARY = 6, 11


def random_inputs(tokens: int) -> tuple[dict[str, Tensor], Tensor]:
    """Return hidden states, the weight of a head, and targets, a third of which are ignored."""
    inputs = {"hidden": torch.randn(tokens, WIDTH), "weight": torch.randn(VOCABULARY, WIDTH)}
    targets = torch.randint(VOCABULARY, (tokens,)).where(torch.arange(tokens) % 3 > 0, -100)
    return {name: x.double().requires_grad_() for name, x in inputs.items()}, targets


def chunked(inputs: dict[str, Tensor], targets: Tensor, counts: Tensor | None = None) -> Tensor:
    return linear_cross_entropy(inputs["hidden"], inputs["weight"], targets, counts)


def with_gradients(inputs: dict[str, Tensor], total: Tensor) -> dict[str, Tensor]:
    """Return the loss, and the gradients of a multiple of it."""
    return {"loss": total} | dict(zip(inputs, torch.autograd.grad(0.3 * total, list(inputs.values())), strict=True))


@pytest.mark.parametrize("chunk", [1, 4, 1000])
@pytest.mark.parametrize("tokens", [2, 7, 65])
def test_equals_cross_entropy(tokens: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK", chunk)
    inputs, targets = random_inputs(tokens)
    expected = cross_entropy(linear(*inputs.values()), targets, reduction="sum")
    FLOAT64.check_all(with_gradients(inputs, chunked(inputs, targets)), with_gradients(inputs, expected))


@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_tokens_are_weighted_by_their_counts(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK", chunk)
    inputs, targets = random_inputs(7)
    counts = torch.rand(7).double()
    expected = cross_entropy(linear(*inputs.values()), targets, reduction="none") @ counts
    FLOAT64.check_all(with_gradients(inputs, chunked(inputs, targets, counts)), with_gradients(inputs, expected))


def test_the_loss_without_targets_is_zero() -> None:
    inputs, targets = random_inputs(7)
    for name, tensor in with_gradients(inputs, chunked(inputs, torch.full_like(targets, -100))).items():
        assert not tensor.any(), name


def test_the_loss_of_no_tokens_is_zero() -> None:
    inputs, targets = random_inputs(0)
    for name, tensor in with_gradients(inputs, chunked(inputs, targets)).items():
        assert not tensor.any(), name


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_input_gets_no_gradient(frozen: str) -> None:
    inputs, targets = random_inputs(7)
    expected = with_gradients(inputs, chunked(inputs, targets))
    inputs[frozen].requires_grad_(False)
    trained = {name: x for name, x in inputs.items() if name != frozen}
    total = chunked(inputs, targets)
    grads = torch.autograd.grad(0.3 * total, list(trained.values()))
    for name, gradient in zip(trained, grads, strict=True):
        FLOAT64.check(gradient, expected[name], name)


def test_the_loss_without_gradients_is_the_same() -> None:
    inputs, targets = random_inputs(7)
    expected = chunked(inputs, targets)
    with torch.no_grad():
        assert torch.equal(chunked(inputs, targets), expected)


def test_large_logits_stay_finite() -> None:
    inputs, targets = random_inputs(7)
    inputs["weight"] = (1e4 * inputs["weight"]).detach().requires_grad_()
    expected = cross_entropy(linear(*inputs.values()), targets, reduction="sum")
    FLOAT64.check_all(with_gradients(inputs, chunked(inputs, targets)), with_gradients(inputs, expected))


def test_float32_and_bfloat16_are_close_to_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK", 16)
    inputs, targets = random_inputs(65)
    inputs = {name: x.detach().bfloat16().double().requires_grad_() for name, x in inputs.items()}
    expected = with_gradients(inputs, cross_entropy(linear(*inputs.values()), targets, reduction="sum"))
    for dtype, close, close_gradient in (
        (torch.float32, FLOAT32, FLOAT32_GRADIENT),
        (torch.bfloat16, BFLOAT16, BFLOAT16),
    ):
        narrow = {name: x.detach().to(dtype).requires_grad_() for name, x in inputs.items()}
        actual = with_gradients(narrow, chunked(narrow, targets))
        assert actual["loss"].dtype == torch.float32
        for name, tensor in expected.items():
            (close if name == "loss" else close_gradient).check(actual[name], tensor, name)


def test_gradcheck() -> None:
    inputs, targets = random_inputs(5)
    assert torch.autograd.gradcheck(
        lambda *tensors: chunked(dict(zip(inputs, tensors, strict=True)), targets), tuple(inputs.values())
    )

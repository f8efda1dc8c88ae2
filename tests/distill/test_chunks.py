"""Losses from hidden states: the same in chunks of any size, and never a tensor of tokens × vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hymba_tune.distill import chunks, losses
from hymba_tune.distill.chunks import Head, TokenLoss, chunk_rows, chunked_loss, log_likelihood
from hymba_tune.model.loss import linear_cross_entropy
from tests.tolerances import BFLOAT16, FLOAT64

TOKENS, WIDTH, VOCABULARY = 13, 6, 11

CPU = torch.device("cpu")


def head(vocabulary: int = VOCABULARY, tokens: int = TOKENS, width: int = WIDTH) -> Head:
    hidden, weight = torch.randn(tokens, width), torch.randn(vocabulary, width)
    return Head(hidden.double().requires_grad_(), weight.double().requires_grad_())


def gradients(total: Tensor, student: Head) -> tuple[Tensor, ...]:
    return torch.autograd.grad(0.3 * total, student)


LOSSES: dict[str, tuple[int, Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "cross-entropy": (7, lambda ours, _, targets: losses.cross_entropy(ours, targets)),
    "forward KL": (VOCABULARY, lambda ours, theirs, _: losses.forward_kl(ours, theirs, temperature=2.0)),
    "reverse KL": (VOCABULARY, lambda ours, theirs, _: losses.reverse_kl(ours, theirs)),
    "Jensen-Shannon": (VOCABULARY, lambda ours, theirs, _: losses.jensen_shannon(ours, theirs, beta=0.3)),
    "ULD": (7, lambda ours, theirs, _: losses.sorted_uld(ours, theirs)),
    "mix": (
        VOCABULARY,
        lambda ours, theirs, targets: losses.mix(
            losses.cross_entropy(ours, targets), losses.forward_kl(ours, theirs), targets > 3, alpha=0.7
        ),
    ),
}


@pytest.mark.parametrize("rows", [1, 5, 1000])
@pytest.mark.parametrize("name", LOSSES)
def test_in_chunks_as_at_once(name: str, rows: int) -> None:
    size, loss = LOSSES[name]
    student, teacher, targets = head(), head(size), torch.randint(VOCABULARY, (TOKENS,))

    def chunk_loss(logits: Tensor, chunk: slice) -> Tensor:
        return loss(logits, teacher.logits(chunk), targets[chunk])

    total = chunked_loss(student, chunk_loss, rows)
    whole = loss(student.logits(slice(None)), teacher.logits(slice(None)), targets).sum()
    FLOAT64.check(total, whole, "loss")
    for found, expected in zip(gradients(total, student), gradients(whole, student), strict=True):
        FLOAT64.check(found, expected, "gradient")


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_is_frozen_gets_no_gradient(frozen: str) -> None:
    student, targets = head(), torch.randint(VOCABULARY, (TOKENS,))
    others = student._asdict()
    getattr(student, frozen).requires_grad_(False)
    del others[frozen]
    by_targets: TokenLoss = lambda logits, chunk: losses.cross_entropy(logits, targets[chunk])  # noqa: E731
    for total in (chunked_loss(student, by_targets, 4), -log_likelihood(student, targets, 4).sum()):
        (found,) = torch.autograd.grad(total, list(others.values()))
        whole = losses.cross_entropy(student.logits(slice(None)), targets).sum()
        FLOAT64.check(found, torch.autograd.grad(whole, list(others.values()))[0])
    with torch.no_grad():
        FLOAT64.check(chunked_loss(student, by_targets, 4), whole)


def test_no_tokens_cost_nothing() -> None:
    student = head(tokens=0)
    for total in (
        chunked_loss(student, lambda logits, _: logits.sum(-1), 4),
        log_likelihood(student, torch.zeros(0, dtype=torch.int64), 4).sum(),
    ):
        assert total == 0
        assert not any(gradient.any() for gradient in gradients(total, student))


@pytest.mark.parametrize("rows", [1, 5, 1000])
def test_log_likelihood(rows: int) -> None:
    student, targets = head(), torch.randint(VOCABULARY, (TOKENS,))
    found = log_likelihood(student, targets, rows)
    expected = -losses.cross_entropy(student.logits(slice(None)), targets)
    FLOAT64.check(found, expected)
    weights = torch.randn(TOKENS, dtype=torch.float64)
    twins = (gradients((weights * values).sum(), student) for values in (found, expected))
    for ours, theirs in zip(*twins, strict=True):
        FLOAT64.check(ours, theirs, "gradient")
    assert gradcheck(lambda hidden, weight: log_likelihood(Head(hidden, weight), targets, rows), tuple(student))


def test_alm_from_hidden_states() -> None:
    student, teacher = head(), head(7, tokens=9)
    ours, theirs = torch.randint(VOCABULARY, (TOKENS,)), torch.randint(7, (9,))
    spans = torch.tensor([[0, 3, 0, 1], [3, 4, 1, 5], [4, 9, 5, 9]]).T

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        with torch.no_grad():
            taught = losses.span_sums(log_likelihood(teacher, theirs, 2), spans[2], spans[3])
        own = losses.span_sums(log_likelihood(Head(hidden, weight), ours, 2), spans[0], spans[1])
        return losses.alm(own, taught, tau=100.0)

    assert gradcheck(loss, tuple(student))


def test_bfloat16_is_reduced_in_float32() -> None:
    wide = head(400)
    student = Head(*(x.detach().bfloat16().requires_grad_() for x in wide))
    targets = torch.randint(400, (TOKENS,))
    total = chunked_loss(student, lambda logits, chunk: losses.cross_entropy(logits, targets[chunk]), 4)
    assert total.dtype == torch.float32
    expected = linear_cross_entropy(wide.hidden, wide.weight, targets)
    BFLOAT16.check(total, expected)
    for found, exact in zip(gradients(total, student), gradients(expected, wide), strict=True):
        assert found.dtype == torch.bfloat16
        BFLOAT16.check(found, exact, "gradient")


class Sizes(TorchDispatchMode):
    """Bytes of the largest tensor made while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.largest = max(self.largest, *(t.numel() * t.element_size() for t in tensors), 0)
        return result


def largest(tokens: int, loss: str) -> int:
    student, teacher = head(300, tokens, 4), head(300 if loss != "ULD" else 1200, tokens, 4)
    targets = torch.randint(300, (tokens,))
    rows = chunk_rows(300, len(teacher.weight), device=CPU)
    with Sizes() as sizes:
        if loss == "ALM":
            total = log_likelihood(student, targets, rows).sum()
        else:
            total = chunked_loss(
                student, lambda logits, chunk: LOSSES[loss][1](logits, teacher.logits(chunk), targets[chunk]), rows
            )
        total.backward()
    return sizes.largest


@pytest.mark.parametrize("name", [*LOSSES, "ALM"])
def test_no_tensor_grows_with_the_tokens(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 60_000)
    few, many = largest(200, name), largest(800, name)
    assert few == many
    assert few <= 2 * 60_000  # in float64


def test_chunks_are_larger_on_a_large_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "device_memory", lambda _: 80 * 2**30)
    assert chunk_rows(2**15, device=CPU) == 512
    assert chunk_rows(2**15, device=torch.device("cuda")) == 5120


def test_chunk_has_a_token_at_least() -> None:
    assert chunk_rows(10**12, device=CPU) == 1

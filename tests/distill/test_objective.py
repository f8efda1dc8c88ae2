"""The loss of a batch against its formula, token by token; targets of rows laid end to end."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hymba_tune.distill import chunks, losses
from hymba_tune.distill.chunks import Head
from hymba_tune.distill.objective import SpanTerm, TokenTerm, distillation_loss, span_term, sparse_term
from hymba_tune.distill.projection import SparseTarget
from hymba_tune.distill.targets import Targets
from tests.tolerances import FLOAT64

TOKENS, WIDTH, VOCABULARY, K = 12, 6, 9, 3
ALPHA, TAU, TEMPERATURE = 0.7, 10.0, 2.0
UNLEARNED = [0, 1, 6, 7]
AT = [2, 3, 8, 11]
SPANS = [[2, 3], [3, 5], [8, 11], [11, 12]]


@pytest.fixture
def student() -> Head:
    return Head(
        torch.randn(TOKENS, WIDTH, dtype=torch.float64, requires_grad=True),
        torch.randn(VOCABULARY, WIDTH, dtype=torch.float64, requires_grad=True),
    )


@pytest.fixture
def labels() -> Tensor:
    labels = torch.randint(VOCABULARY, (TOKENS,))
    labels[UNLEARNED] = -100
    return labels


def make_targets(at: list[int], spans: list[list[int]]) -> Targets:
    student_tokens = torch.stack([torch.randperm(VOCABULARY)[:K] for _ in at])
    shares = torch.rand(len(at), K + 1, dtype=torch.float64)
    shares /= shares.sum(-1, keepdim=True)
    top = SparseTarget(student_tokens, shares[:, :-1].log(), shares[:, -1].log())
    return Targets(torch.tensor(at), top, torch.tensor(spans), -3 * torch.rand(len(spans), dtype=torch.float64))


def expected_loss(student: Head, labels: Tensor, tokens: TokenTerm | None, spans: SpanTerm | None) -> Tensor:
    """The same, one token and one span at a time."""
    logits = student.hidden @ student.weight.T
    log_probs = logits.log_softmax(-1)
    total = torch.zeros((), dtype=torch.float64)
    at = [] if tokens is None else tokens.at.tolist()
    bounds = [] if spans is None else spans.spans.tolist()
    for place, label in enumerate(labels.tolist()):
        if label == -100:
            continue
        data = -log_probs[place, label]
        taught = torch.zeros((), dtype=torch.float64)
        if tokens is not None and place in at:
            number = at.index(place)
            taught = tokens.weight * tokens.loss(logits[place : place + 1], slice(number, number + 1))[0]
        elif not any(begin <= place < end for begin, end in bounds):
            taught = data
        total = total + (1 - ALPHA) * data + ALPHA * taught
    for number, (begin, end) in enumerate(bounds):
        assert spans is not None
        likelihood = sum(log_probs[place, labels[place]] for place in range(begin, end))
        value = losses.alm(likelihood, spans.log_likelihoods[number], tau=TAU)
        total = total + ALPHA * spans.weight * value
    return total


@pytest.mark.parametrize("mixed", ["ce", "sparse", "spans", "both", "sparse and spans without a target"])
@pytest.mark.parametrize("chunk", [1 << 26, 4 * 2 * VOCABULARY])
def test_loss_and_gradients(
    mixed: str, chunk: int, student: Head, labels: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "CHUNK_BYTES", chunk)
    targets = make_targets(AT, SPANS)
    tokens = sparse_term(targets, temperature=TEMPERATURE, weight=0.8) if "sparse" in mixed or mixed == "both" else None
    only = mixed.endswith("without a target")
    spans = None
    if "spans" in mixed or mixed == "both":
        spans = span_term(targets, tau=TAU, weight=0.6, only_without_target=only)
        assert spans.spans.tolist() == ([[3, 5], [8, 11]] if only else SPANS)
    found = distillation_loss(student, labels, alpha=ALPHA, tokens=tokens, spans=spans)
    expected = expected_loss(student, labels, tokens, spans)
    FLOAT64.check(found.total, expected, "loss")
    for got, wanted in zip(
        torch.autograd.grad(found.total, list(student)), torch.autograd.grad(expected, list(student)), strict=True
    ):
        FLOAT64.check(got, wanted, "gradient")
    assert found.tokens == TOKENS - len(UNLEARNED)
    assert set(found.parts) == {"ce"} | ({"kd"} if tokens else set()) | ({"alm"} if spans else set())


def test_alpha_zero_is_cross_entropy(student: Head, labels: Tensor) -> None:
    targets = make_targets(AT, SPANS)
    found = distillation_loss(student, labels, alpha=0.0, tokens=sparse_term(targets))
    logits = student.hidden @ student.weight.T
    FLOAT64.check(found.total, torch.nn.functional.cross_entropy(logits, labels, reduction="sum"), "loss")
    FLOAT64.check(found.parts["ce"], found.total, "part")


def test_rows_joined_are_rows_alone(student: Head, labels: Tensor) -> None:
    half = TOKENS // 2
    rows = [make_targets([2, 3], [[2, 3], [3, 5]]), make_targets([2, 5], [[2, 5], [5, 6]])]
    joined = Targets.joined(rows, [0, half])
    together = distillation_loss(student, labels, alpha=ALPHA, tokens=sparse_term(joined)).total
    alone = [
        distillation_loss(
            Head(student.hidden[begin : begin + half], student.weight),
            labels[begin : begin + half],
            alpha=ALPHA,
            tokens=sparse_term(row),
        ).total
        for begin, row in zip((0, half), rows, strict=True)
    ]
    FLOAT64.check(together, alone[0] + alone[1], "loss")
    assert joined.spans.tolist() == [[2, 3], [3, 5], [8, 11], [11, 12]]


def test_nothing_learned_costs_nothing(student: Head) -> None:
    found = distillation_loss(student, torch.full((TOKENS,), -100), alpha=ALPHA)
    assert found.total.item() == 0
    assert found.tokens == 0

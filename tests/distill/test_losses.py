"""Each loss against its formula written out: values and every gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional

from hymba_tune.distill import losses
from hymba_tune.distill.projection import ProjectedTarget, SparseTarget
from tests.reference import naive_losses as naive
from tests.tolerances import FLOAT32, FLOAT64

TOKENS, VOCABULARY, OTHER = 5, 11, 17
TEMPERATURES = [0.5, 1.0, 3.0]

Loss = Callable[..., Tensor]


def logits(vocabulary: int = VOCABULARY, tokens: int = TOKENS) -> Tensor:
    return 3 * torch.randn(tokens, vocabulary, dtype=torch.float64)


def target(support: int = 7) -> ProjectedTarget:
    """The first token's has no rest_mass, the last is not known; supports of any places."""
    weights = torch.rand(TOKENS, VOCABULARY + 1, dtype=torch.float64)
    for token in range(TOKENS):
        weights[token, torch.randperm(VOCABULARY)[support:]] = 0
    weights[0, -1] = 0
    weights /= weights.sum(-1, keepdim=True)
    known = torch.arange(TOKENS) < TOKENS - 1
    ones = torch.ones(TOKENS, dtype=torch.float64)
    return ProjectedTarget(weights[:, :-1], weights[:, -1], known, ones)


def check(loss: Loss, twin: Loss, student: Tensor, *others: Tensor, **settings: float) -> None:
    """Values and gradients of each token's, which are weighted so that they do not cancel."""
    student = student.requires_grad_()
    found = loss(student, *others, **settings)
    rows = zip(student, *others, strict=True)
    expected = torch.stack([twin(*row, *settings.values()) for row in rows])
    FLOAT64.check(found, expected, "values")
    weights = torch.arange(1.0, len(expected) + 1, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((weights * found).sum(), student)
    FLOAT64.check(gradient, torch.autograd.grad((weights * expected).sum(), student)[0], "gradient")
    assert gradcheck(partial(loss, **settings), (student, *others))


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
def test_divergence(name: str, temperature: float) -> None:
    check(getattr(losses, name), getattr(naive, name), logits(), logits(), temperature=temperature)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_jensen_shannon(beta: float, temperature: float) -> None:
    check(losses.jensen_shannon, naive.jensen_shannon, logits(), logits(), beta=beta, temperature=temperature)


@pytest.mark.parametrize(("beta", "end"), [(0.0, losses.forward_kl), (1.0, losses.reverse_kl)])
def test_jensen_shannon_ends_where_it_tends_to(beta: float, end: Loss) -> None:
    student, teacher = logits(), logits()
    near = abs(beta - 1e-6)
    expected = losses.jensen_shannon(student, teacher, beta=near) / min(near, 1 - near)
    ends = losses.jensen_shannon(student, teacher, beta=beta)
    assert torch.equal(ends, end(student, teacher))
    torch.testing.assert_close(ends, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("teacher", [VOCABULARY, OTHER, 7])
def test_sorted_uld(teacher: int) -> None:
    check(losses.sorted_uld, naive.sorted_uld, logits(), logits(teacher), temperature=2.0)


def test_teacher_is_a_constant() -> None:
    for name in ("forward_kl", "reverse_kl", "sorted_uld"):
        student, teacher = logits().requires_grad_(), logits().requires_grad_()
        getattr(losses, name)(student, teacher).sum().backward()
        assert student.grad is not None
        assert teacher.grad is None, name


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_projection(temperature: float) -> None:
    want = target()

    def loss(student: Tensor, probs: Tensor, rest_mass: Tensor, temperature: float) -> Tensor:
        return losses.projection_kl(student, replace(want, probs=probs, rest_mass=rest_mass), temperature=temperature)

    def twin(student: Tensor, probs: Tensor, rest_mass: Tensor, known: Tensor) -> Tensor:
        return naive.projection(student, probs, rest_mass, temperature) * known

    student = logits().requires_grad_()
    found = loss(student, want.probs, want.rest_mass, temperature)
    expected = torch.stack([twin(*row) for row in zip(student, want.probs, want.rest_mass, want.known, strict=True)])
    FLOAT64.check(found, expected, "values")
    gradient, twins = (torch.autograd.grad(total.sum(), student)[0] for total in (found, expected))
    FLOAT64.check(gradient, twins, "gradient")
    assert gradcheck(lambda x: loss(x, want.probs, want.rest_mass, temperature), student)


@pytest.mark.parametrize("k", [1, 4, 7, 9, VOCABULARY, 99])
def test_sparse_projection_is_that_of_its_tokens(k: int) -> None:
    """What is cut off is in the rest_mass."""
    whole = target()
    sparse = whole.top(k)
    probs = torch.zeros_like(whole.probs).scatter(1, sparse.student_tokens, sparse.log_probs.exp())
    rest_mass = sparse.rest_mass.exp()
    FLOAT64.check(probs.sum(-1) + rest_mass, torch.ones_like(rest_mass))
    student = logits().requires_grad_()
    found = losses.sparse_projection_kl(student, sparse, temperature=2.0)
    rows = zip(student, probs, rest_mass, strict=True)
    expected = torch.stack([naive.projection(*row, temperature=2.0) for row in rows])
    FLOAT64.check(found, expected, "values")
    gradient, twins = (torch.autograd.grad(total.sum(), student)[0] for total in (found, expected))
    FLOAT64.check(gradient, twins, "gradient")


def test_top_k_of_the_whole_vocabulary_is_the_whole_target() -> None:
    student, whole = logits(), target()
    dense = losses.projection_kl(student, whole)
    sparse = losses.sparse_projection_kl(student, whole.top(7))
    FLOAT64.check(torch.where(whole.known, sparse, 0), dense)


def test_full_support_leaves_no_rest_mass() -> None:
    """Log zero stays out of values and gradients."""
    student, student_tokens = logits().requires_grad_(), torch.arange(VOCABULARY).expand(TOKENS, -1)
    probs = logits().softmax(-1)
    ones = torch.ones(TOKENS)
    full = ProjectedTarget(probs, torch.zeros(TOKENS), torch.ones(TOKENS, dtype=torch.bool), ones)
    left_over = SparseTarget(student_tokens, probs.log(), torch.full((TOKENS,), -30.0))
    for found in (losses.projection_kl(student, full), losses.sparse_projection_kl(student, left_over)):
        FLOAT64.check(found, losses.forward_kl(student, probs.log()))
        assert torch.autograd.grad(found.sum(), student)[0].isfinite().all()


@pytest.mark.parametrize("tau", [1.0, 100.0])
def test_alm(tau: float) -> None:
    student, teacher = (-4 * torch.rand(9, dtype=torch.float64) - 1e-3 for _ in range(2))
    check(losses.alm, naive.alm, student, teacher, tau=tau)


def test_alm_keeps_its_digits_where_spans_are_certain() -> None:
    """In float32, 1 - exp(f / tau) has none left at f = -1e-5."""
    student, teacher = -torch.logspace(-5, 1, 13), -torch.logspace(1, -5, 13)
    inputs = student.requires_grad_(), student.detach().double().requires_grad_()
    found = losses.alm(inputs[0], teacher, tau=100.0)
    expected = losses.alm(inputs[1], teacher.double(), tau=100.0)
    FLOAT32.check(found, expected, "values")
    gradients = [torch.autograd.grad(loss.sum(), x)[0] for loss, x in zip((found, expected), inputs, strict=True)]
    FLOAT32.check(*gradients, "gradient")


def test_alm_is_finite_at_certainty() -> None:
    student = torch.tensor([0.0, -1e-9, -1e-6, -300.0, -1e4]).requires_grad_()
    for teacher in (torch.zeros(5), torch.full((5,), -1e4)):
        found = losses.alm(student, teacher, tau=100.0)
        assert found.isfinite().all()
        assert torch.autograd.grad(found.sum(), student)[0].isfinite().all()


def test_alm_is_least_where_both_agree() -> None:
    student = torch.tensor([-0.3, -5.0, -90.0], dtype=torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(losses.alm(student, student.detach(), tau=100.0).sum(), student)
    FLOAT64.check(gradient, torch.zeros(3, dtype=torch.float64))


def test_alm_gradient_does_not_vanish_with_tau() -> None:
    """Of a student that is much too sure, or not nearly: about one a nat, whatever tau."""
    for tau in (10.0, 100.0, 1000.0):
        student = torch.tensor([-8.0]).requires_grad_()
        (gradient,) = torch.autograd.grad(losses.alm(student, torch.tensor([-1.0]), tau=tau).sum(), student)
        assert -1 < gradient.item() < -0.5


def test_span_sums() -> None:
    values = torch.arange(10.0).requires_grad_()
    begin, end = torch.tensor([1, 3, 3, 7]), torch.tensor([3, 3, 6, 8])
    found = losses.span_sums(values, begin, end)
    assert found.tolist() == [3, 0, 12, 7]
    found.sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [0, 1, 1, 1, 1, 1, 0, 1, 0, 0]


def test_cross_entropy() -> None:
    student, targets = logits().requires_grad_(), torch.tensor([0, 3, 10, 10, 2])
    FLOAT64.check(losses.cross_entropy(student, targets), functional.cross_entropy(student, targets, reduction="none"))


def test_mix() -> None:
    data, taught = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([5.0, 6.0, math.inf])
    found = losses.mix(data, taught, torch.tensor([True, True, False]), alpha=0.75)
    assert found.tolist() == [4.0, 5.0, 3.0]
    assert losses.mix(data, taught[:1], alpha=0.0).tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_temperature_is_positive(temperature: float) -> None:
    for name, teacher in [("forward_kl", logits()), ("sorted_uld", logits()), ("projection_kl", target())]:
        loss: Any = getattr(losses, name)
        with pytest.raises(ValueError, match=f"temperature is {temperature}; expected more than 0"):
            loss(logits(), teacher, temperature=temperature)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"student logits are \(5, 11\) and the teacher's \(5, 17\)"):
        losses.forward_kl(logits(), logits(OTHER))
    with pytest.raises(ValueError, match="beta is 2; expected 0 to 1"):
        losses.jensen_shannon(logits(), logits(), beta=2)
    with pytest.raises(ValueError, match="tau is 0; expected more than 0"):
        losses.alm(torch.zeros(1), torch.zeros(1), tau=0)
    with pytest.raises(ValueError, match=r"alpha is 1\.5; expected 0 to 1"):
        losses.mix(torch.zeros(1), torch.zeros(1), alpha=1.5)

"""Distillation losses of single tokens, computed from logits; `chunks` computes them from hidden states.

All losses are in nats, and in float32 or wider. Losses with a temperature are multiplied by its square, which keeps the
gradients in the same range (Hinton et al. 2015, section 2). The teacher's side is always a constant.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import kl_div, pad

from hymba_tune.distill.chunks import expand
from hymba_tune.distill.projection import ProjectedTarget, SparseTarget

LEAST = 1e-6
"""Log-likelihoods are clamped this far below zero: at zero, log(1 - p) is infinite."""


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p(target).

    Args:
        logits: ``(N, V)``.
        targets: ``(N,)`` int64.

    Returns:
        ``(N,)``.
    """
    return -_log_probs(logits, 1.0).gather(1, targets[:, None]).squeeze(1)


def forward_kl(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) over one vocabulary.

    Args:
        student: Logits, ``(N, V)``.
        teacher: Logits, ``(N, V)``.
        temperature: The softmax temperature, above 0.

    Returns:
        ``(N,)``.

    Raises:
        ValueError: If the vocabularies differ, or the temperature is not positive.
    """
    ours, theirs = _same_vocabulary(student, teacher, temperature)
    return _kl(theirs, ours) * temperature**2


def reverse_kl(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    """KL(student || teacher), with the arguments and errors of `forward_kl`."""
    ours, theirs = _same_vocabulary(student, teacher, temperature)
    return _kl(ours, theirs) * temperature**2


def jensen_shannon(student: Tensor, teacher: Tensor, *, beta: float, temperature: float = 1.0) -> Tensor:
    """Generalized Jensen-Shannon divergence (Agarwal et al. 2024, section 2).

    beta · KL(teacher || m) + (1 - beta) · KL(student || m), with m = beta · teacher + (1 - beta) · student. Where
    beta is 0 or 1 this is zero, and the loss is the limit of its ratio to beta instead: `forward_kl` at 0, `reverse_kl`
    at 1.

    Args:
        student: Logits, ``(N, V)``.
        teacher: Logits, ``(N, V)``.
        beta: The teacher's share of the mixture, in ``[0, 1]``.
        temperature: The softmax temperature, above 0.

    Returns:
        ``(N,)``.

    Raises:
        ValueError: If ``beta`` is outside its range, the vocabularies differ, or the temperature is not positive.
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta is {beta}; expected 0 to 1")
    if beta == 0:
        return forward_kl(student, teacher, temperature=temperature)
    if beta == 1:
        return reverse_kl(student, teacher, temperature=temperature)
    ours, theirs = _same_vocabulary(student, teacher, temperature)
    mixture = torch.logaddexp(theirs + math.log(beta), ours + math.log1p(-beta))
    return (beta * _kl(theirs, mixture) + (1 - beta) * _kl(ours, mixture)) * temperature**2


def projection_kl(student: Tensor, target: ProjectedTarget, *, temperature: float = 1.0) -> Tensor:
    """KL(target || student), with the rest mass compared to the student's mass on all tokens outside the support.

    Args:
        student: Logits, ``(N, V)``.
        target: The target, made at the same temperature.
        temperature: The softmax temperature, above 0.

    Returns:
        ``(N,)``; zero where there is no target.

    Raises:
        ValueError: If the temperature is not positive.
    """
    ours = _log_probs(student, temperature)
    inside = (torch.xlogy(target.probs, target.probs) - target.probs * ours).sum(-1)
    total = inside + _rest_kl(target.rest_mass.log(), ours, target.probs > 0)
    return torch.where(target.known, total, 0) * temperature**2


def sparse_projection_kl(student: Tensor, target: SparseTarget, *, temperature: float = 1.0) -> Tensor:
    """`projection_kl` for a target that stores its most likely tokens only. There must be a target everywhere."""
    ours = _log_probs(student, temperature)
    known = target.log_probs > -math.inf
    theirs = torch.where(known, target.log_probs, 0).to(ours.dtype)
    inside = torch.where(known, theirs.exp() * (theirs - ours.gather(1, target.student_tokens)), 0).sum(-1)
    support = torch.zeros_like(ours, dtype=torch.bool).scatter(1, target.student_tokens, known)
    return (inside + _rest_kl(target.rest_mass.to(ours.dtype), ours, support)) * temperature**2


def _rest_kl(rest_mass: Tensor, ours: Tensor, support: Tensor) -> Tensor:
    """KL term of the rest mass, from log-probabilities; 0 where the rest mass or the tokens outside are none."""
    empty = (rest_mass == -math.inf) | support.all(-1)
    # An empty one sums over all tokens instead: the gradient of an empty sum is NaN, even when multiplied by zero.
    outside = ours.masked_fill(support & ~empty[:, None], -math.inf).logsumexp(-1)
    rest_mass = rest_mass.masked_fill(empty, 0)
    return torch.where(empty, 0, rest_mass.exp() * (rest_mass - outside))


def alm(student: Tensor, teacher: Tensor, *, tau: float) -> Tensor:
    """Approximate likelihood matching (Minixhofer et al. 2025) of spans.

    -tau · [q_t log q_s + (1 - q_t) log(1 - q_s)], with q = likelihood ** (1 / tau). The factor keeps the
    gradients in the same range as tau grows.

    Args:
        student: The student's log-likelihoods of the spans, ``(S,)``; values above -1e-6 have no gradient.
        teacher: The teacher's log-likelihoods of the same spans, ``(S,)``.
        tau: The temperature of the likelihoods, above 0.

    Returns:
        ``(S,)``.

    Raises:
        ValueError: If ``tau`` is not positive.
    """
    if not tau > 0:
        raise ValueError(f"tau is {tau}; expected more than 0")
    ours, theirs = (f.clamp(max=-LEAST) / tau for f in (student, teacher.detach()))
    # log(1 - q) = log(-expm1(log q)), which stays accurate as q approaches 1.
    return -tau * (theirs.exp() * ours - torch.expm1(theirs) * torch.log(-torch.expm1(ours)))


def span_sums(values: Tensor, begin: Tensor, end: Tensor) -> Tensor:
    """Return the sums of ``values[begin:end]``, ``(S,)``: from log-likelihoods of tokens to those of spans."""
    span, at = expand(begin, end)
    return values.new_zeros(len(begin)).index_add(0, span, values[at])


def sorted_uld(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Universal logit distillation (Boizard et al. 2024): the L1 distance between sorted probabilities.

    The loss does not depend on what the tokens are. The smaller vocabulary is padded with zeros.

    Args:
        student: Logits, ``(N, V)``.
        teacher: Logits over any vocabulary, ``(N, W)``.
        temperature: The softmax temperature, above 0.

    Returns:
        ``(N,)``.

    Raises:
        ValueError: If the temperature is not positive.
    """
    ours = _log_probs(student, temperature).exp().sort(-1, descending=True).values
    theirs = _log_probs(teacher.detach(), temperature).exp().sort(-1, descending=True).values
    size = max(ours.shape[1], theirs.shape[1])
    ours, theirs = (pad(side, (0, size - side.shape[1])) for side in (ours, theirs))
    return (ours - theirs).abs().sum(-1) * temperature**2


def mix(data: Tensor, taught: Tensor, known: Tensor | bool = True, *, alpha: float) -> Tensor:
    """(1 - alpha) · cross-entropy + alpha · the teacher's loss; cross-entropy alone where there is no teacher loss.

    Args:
        data: The cross-entropies, ``(N,)``.
        taught: The teacher's loss, ``(N,)``.
        known: ``(N,)`` bool: where there is a teacher's loss.
        alpha: The teacher's share, in ``[0, 1]``.

    Returns:
        ``(N,)``.

    Raises:
        ValueError: If ``alpha`` is outside its range.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; expected 0 to 1")
    return torch.lerp(data, torch.where(torch.as_tensor(known, device=data.device), taught, data), alpha)


def _log_probs(logits: Tensor, temperature: float) -> Tensor:
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; expected more than 0")
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (wide if temperature == 1 else wide / temperature).log_softmax(-1)


def _same_vocabulary(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    if student.shape != teacher.shape:
        raise ValueError(f"student logits are {tuple(student.shape)} and the teacher's {tuple(teacher.shape)}")
    return _log_probs(student, temperature), _log_probs(teacher.detach(), temperature)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of log-probabilities."""
    return kl_div(q, p, reduction="none", log_target=True).sum(-1)

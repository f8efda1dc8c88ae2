"""Distillation's losses of one token, term by term from probabilities."""

from __future__ import annotations

import torch
from torch import Tensor


def softmax(logits: Tensor, temperature: float) -> Tensor:
    weights = (logits / temperature - (logits / temperature).max()).exp()
    return weights / weights.sum()


def kl(p: Tensor, q: Tensor) -> Tensor:
    return torch.stack([a * (a.log() - b.log()) for a, b in zip(p, q, strict=True) if a > 0]).sum()


def forward_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    return temperature**2 * kl(softmax(teacher, temperature), softmax(student, temperature))


def reverse_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    return temperature**2 * kl(softmax(student, temperature), softmax(teacher, temperature))


def jensen_shannon(student: Tensor, teacher: Tensor, beta: float, temperature: float) -> Tensor:
    p, q = softmax(teacher, temperature), softmax(student, temperature)
    m = beta * p + (1 - beta) * q
    return temperature**2 * (beta * kl(p, m) + (1 - beta) * kl(q, m))


def projection(student: Tensor, probs: Tensor, rest_mass: Tensor, temperature: float) -> Tensor:
    """The rest_mass is one outcome: any token that the target gives nothing."""
    q = softmax(student, temperature)
    total = torch.zeros((), dtype=student.dtype)
    outside = torch.zeros((), dtype=student.dtype)
    for target, ours in zip(probs, q, strict=True):
        if target > 0:
            total = total + target * (target.log() - ours.log())
        else:
            outside = outside + ours
    if rest_mass > 0:
        total = total + rest_mass * (rest_mass.log() - outside.log())
    return temperature**2 * total


def alm(student: Tensor, teacher: Tensor, tau: float) -> Tensor:
    """From one span's log-likelihoods."""
    ours, theirs = ((f / tau).exp() for f in (student, teacher))
    return -tau * (theirs * ours.log() + (1 - theirs) * (1 - ours).log())


def sorted_uld(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    sides = [sorted(softmax(side, temperature).unbind(), reverse=True) for side in (student, teacher)]
    size = max(map(len, sides))
    zero = torch.zeros((), dtype=student.dtype)
    ours, theirs = (side + [zero] * (size - len(side)) for side in sides)
    return temperature**2 * torch.stack([(a - b).abs() for a, b in zip(ours, theirs, strict=True)]).sum()

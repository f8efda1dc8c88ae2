"""Losses from hidden states and heads, a few tokens at a time: no tensor is tokens × vocabulary in size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from hymba_tune.model.autocast import to_autocast_dtype

CHUNK_BYTES = 1 << 26
"""Float32 logits held at a time, the student's and the teacher's together. Losses hold up to six times as much."""

TokenLoss = Callable[[Tensor, slice], Tensor]
"""From the student's logits ``(n, V)`` of some tokens, and which they are, to their losses, ``(n,)``."""


class Head(NamedTuple):
    """Hidden states ``(T, d)`` and the output layer's weight ``(V, d)``: logits not computed yet."""

    hidden: Tensor
    weight: Tensor

    def logits(self, rows: slice | Tensor) -> Tensor:
        """Logits ``(n, V)`` of some tokens, in float32 or wider."""
        hidden = self.hidden[rows]
        return linear(hidden, self.weight.to(hidden.dtype)).to(torch.promote_types(hidden.dtype, torch.float32))


def chunk_rows(*vocabularies: int) -> int:
    """Tokens in a chunk, when the loss needs logits over these vocabularies at once."""
    return max(1, CHUNK_BYTES // (4 * sum(vocabularies)))


def chunked_loss(student: Head, loss: TokenLoss, rows: int) -> Tensor:
    """Sum of a loss over tokens, ``rows`` of them at a time.

    The gradients are computed on the way: neither logits are kept nor computed again.

    Args:
        student: Gradients reach both tensors.
        loss: Computed for each chunk; what it uses beside the student's logits is a constant to it.
        rows: Tokens at a time, as `chunk_rows` says.

    Returns:
        A float32 scalar (float64 for float64 hidden states).
    """
    total: Tensor = _ChunkedLoss.apply(student.hidden, student.weight, loss, rows)
    return total


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, loss: TokenLoss, rows: int) -> Tensor:
        student, gradients = Head(hidden, weight), _Gradients(ctx.needs_input_grad, hidden, weight)
        total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        for chunk in _chunks(hidden, rows):
            logits = student.logits(chunk).requires_grad_(gradients.needed)
            with torch.set_grad_enabled(gradients.needed):
                part = loss(logits, chunk).sum()
            total += part.detach()
            if gradients.needed:
                (d_logits,) = torch.autograd.grad(part, logits)
                gradients.add(chunk, d_logits)
        ctx.save_for_backward(gradients.hidden, gradients.weight)
        return total

    @staticmethod
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [None if g is None else g * d_total.to(g.dtype) for g in ctx.saved_tensors]
        return *gradients, None, None


def log_likelihood(student: Head, targets: Tensor, rows: int) -> Tensor:
    """Log-probability of each target, for losses that need those of several tokens at once.

    The backward computes the logits again.

    Args:
        student: Gradients reach both tensors.
        targets: ``(T,)`` int64, one for each hidden state.
        rows: Tokens at a time.

    Returns:
        ``(T,)`` float32 (float64 for float64 hidden states), nats.
    """
    # The backward, which runs outside autocast, has to compute the same logits.
    found: Tensor = _LogLikelihood.apply(to_autocast_dtype(student.hidden), student.weight, targets, rows)
    return found


class _LogLikelihood(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, rows: int) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        found = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        normalizer = torch.empty_like(found)
        for chunk in _chunks(hidden, rows):
            logits = Head(hidden, weight).logits(chunk)
            normalizer[chunk] = logits.logsumexp(-1)
            found[chunk] = logits.gather(1, targets[chunk, None]).squeeze(1) - normalizer[chunk]
        ctx.save_for_backward(hidden, weight, targets, normalizer)
        ctx.rows = rows
        return found

    @staticmethod
    def backward(ctx: Any, d_found: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, normalizer = ctx.saved_tensors
        gradients = _Gradients(ctx.needs_input_grad, hidden, weight)
        for chunk in _chunks(hidden, ctx.rows):
            d_logits = Head(hidden, weight).logits(chunk).sub_(normalizer[chunk, None]).exp_().neg_()
            d_logits.scatter_add_(1, targets[chunk, None], torch.ones_like(d_logits[:, :1]))
            gradients.add(chunk, d_logits.mul_(d_found[chunk, None]))
        return gradients.hidden, gradients.weight, None, None


def expand(begin: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """All numbers of some ranges ``[begin, end)``, one range after the other, behind which range each is of."""
    counts = end - begin
    owner = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    before = counts.cumsum(0) - counts
    return owner, torch.arange(len(owner), device=counts.device) + (begin - before)[owner]


def _chunks(hidden: Tensor, rows: int) -> Iterator[slice]:
    return (slice(begin, begin + rows) for begin in range(0, len(hidden), rows))


class _Gradients:
    """The gradients of hidden states and weight, as far as they are needed, gathered from those of logits."""

    def __init__(self, needed: tuple[bool, ...], hidden: Tensor, weight: Tensor) -> None:
        self._inputs = hidden, weight
        wide = torch.promote_types(hidden.dtype, torch.float32)
        self.hidden = torch.empty_like(hidden) if needed[0] else None
        self.weight = torch.zeros_like(weight, dtype=wide) if needed[1] else None
        self.needed = any(needed[:2])

    def add(self, rows: slice, d_logits: Tensor) -> None:
        hidden, weight = self._inputs
        d_logits = d_logits.to(hidden.dtype)
        if self.hidden is not None:
            self.hidden[rows] = d_logits @ weight.to(hidden.dtype)
        if self.weight is not None:
            self.weight += d_logits.mT @ hidden[rows]

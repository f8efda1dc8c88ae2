"""Functions of the logits of an output layer, one chunk of tokens at a time, so that the logits never exist at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

ChunkLoss = Callable[[Tensor, slice, bool], tuple[Tensor, Tensor | None]]
"""A function of the logits ``(n, V)`` of a chunk, its slice of the tokens, and whether a gradient is needed. It returns
the sum of the losses of the chunk and the gradient of that sum with respect to the logits, or None."""


def chunked_sum(hidden: Tensor, weight: Tensor, chunk_loss: ChunkLoss, rows: int) -> Tensor:
    """Compute the sum of a loss over tokens.

    The forward also computes the gradients, so that no logits are stored or recomputed.

    Args:
        hidden: Hidden states, ``(T, d)``.
        weight: The weight of the output layer, ``(V, d)``.
        chunk_loss: The loss of a chunk; it may overwrite the logits. Everything else that it reads is a constant.
        rows: The number of tokens in a chunk.

    Returns:
        A float32 scalar (float64 for float64 hidden states).
    """
    total: Tensor = _ChunkedSum.apply(hidden, weight, chunk_loss, rows)
    return total


def chunked_log_probs(
    hidden: Tensor, weight: Tensor, targets: Tensor, rows: int, *, statistics: bool = False
) -> tuple[Tensor, ...]:
    """Compute the log-probability of each target.

    The backward recomputes the logits, because the gradient of each token is only known then. It runs outside
    autocast, so ``hidden`` must have the dtype that autocast gives to matrix products.

    Args:
        hidden: Hidden states, ``(T, d)``.
        weight: The weight of the output layer, ``(V, d)``.
        targets: The target tokens, ``(T,)`` int64.
        rows: The number of tokens in a chunk.
        statistics: Whether to return the statistics of the distributions as well, which have no gradient.

    Returns:
        ``(T,)`` log-probabilities in float32 (float64 for float64 hidden states), nats; with ``statistics`` also the
        entropies, the mean logits, and whether each target was the most likely token.
    """
    values: tuple[Tensor, ...] = _ChunkedLogProbs.apply(hidden, weight, targets, rows, statistics)
    return values


class _ChunkedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, chunk_loss: ChunkLoss, rows: int) -> Tensor:
        gradients = _Gradients(ctx.needs_input_grad, hidden, weight)
        total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        for chunk in _chunks(len(hidden), rows):
            # The logits are not assigned to a variable, so that the loss can free them early.
            loss, d_logits = chunk_loss(linear(hidden[chunk], gradients.cast_weight), chunk, gradients.needed)
            total += loss
            if d_logits is not None:
                gradients.add(chunk, d_logits)
        ctx.save_for_backward(gradients.hidden, gradients.weight)
        return total

    @staticmethod
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [None if g is None else g * d_total.to(g.dtype) for g in ctx.saved_tensors]
        return *gradients, None, None


class _ChunkedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, rows: int, statistics: bool
    ) -> tuple[Tensor, ...]:
        cast_weight = weight.to(hidden.dtype)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        normalizers, log_probs = (hidden.new_empty(len(targets), dtype=wide) for _ in range(2))
        entropy, means = (torch.empty_like(log_probs) if statistics else None for _ in range(2))
        is_top1 = torch.empty_like(targets, dtype=torch.bool) if statistics else None
        for chunk in _chunks(len(targets), rows):
            logits = linear(hidden[chunk], cast_weight).to(wide)
            chosen = logits.gather(1, targets[chunk, None])[:, 0]
            normalizers[chunk] = logits.logsumexp(-1)
            log_probs[chunk] = chosen - normalizers[chunk]
            if entropy is not None and means is not None and is_top1 is not None:
                means[chunk] = logits.mean(-1)
                is_top1[chunk] = chosen >= logits.amax(-1)
                probabilities = (logits - normalizers[chunk, None]).exp_()
                entropy[chunk] = normalizers[chunk] - torch.linalg.vecdot(probabilities, logits)
        ctx.save_for_backward(hidden, weight, targets, normalizers)
        ctx.rows = rows
        extra = [value for value in (entropy, means, is_top1) if value is not None]
        ctx.mark_non_differentiable(*extra)
        return log_probs, *extra

    @staticmethod
    def backward(ctx: Any, d_log_probs: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, normalizers = ctx.saved_tensors
        gradients = _Gradients(ctx.needs_input_grad, hidden, weight)
        for chunk in _chunks(len(targets), ctx.rows):
            logits = linear(hidden[chunk], gradients.cast_weight).to(normalizers.dtype)
            d_logits = logits.sub_(normalizers[chunk, None]).exp_().neg_()
            d_logits[torch.arange(len(d_logits), device=d_logits.device), targets[chunk]] += 1
            gradients.add(chunk, d_logits.mul_(d_log_probs[chunk, None]))
        return gradients.hidden, gradients.weight, None, None, None


class _Gradients:
    """The gradients of the hidden states and the weight that are needed, accumulated from those of the logits."""

    def __init__(self, needed: tuple[bool, ...], hidden: Tensor, weight: Tensor) -> None:
        self._hidden_states = hidden
        self.cast_weight = weight.to(hidden.dtype)
        self.needed = any(needed[:2])
        self.hidden = torch.empty_like(hidden) if needed[0] else None
        # The gradient of the weight sums over all chunks; in bfloat16 small summands would be lost.
        wide = torch.promote_types(hidden.dtype, torch.float32)
        self.weight = torch.zeros_like(weight, dtype=wide) if needed[1] else None

    def add(self, chunk: slice, d_logits: Tensor) -> None:
        d_logits = d_logits.to(self._hidden_states.dtype)
        if self.hidden is not None:
            self.hidden[chunk] = d_logits @ self.cast_weight
        if self.weight is not None:
            self.weight += d_logits.mT @ self._hidden_states[chunk]


def _chunks(tokens: int, rows: int) -> Iterator[slice]:
    return (slice(begin, begin + rows) for begin in range(0, tokens, rows))

"""Next-token cross-entropy that never holds the logits of all tokens at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK = 1024
"""Tokens whose logits are held at a time."""


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, counts: Tensor | None = None) -> Tensor:
    """Sum of the cross-entropies of ``hidden @ weight.T`` against the targets.

    Args:
        hidden: ``(T, d)``.
        weight: ``(V, d)``.
        targets: ``(T,)``, -100 where nothing is learned; those tokens cost nothing.
        counts: ``(T,)``: how much each token counts; 1 when not given.

    Returns:
        A float32 scalar (float64 for float64 inputs), nats.
    """
    learned = targets != -100
    return learned_cross_entropy(hidden[learned], weight, targets[learned], None if counts is None else counts[learned])


def learned_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, counts: Tensor | None = None) -> Tensor:
    """`linear_cross_entropy` where every token is learned: no target is -100."""
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, targets, counts)
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    """The forward computes the gradients as well: then no logits have to be kept or computed again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, counts: Tensor | None) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        need_hidden, need_weight, *_ = ctx.needs_input_grad
        weight = weight.to(hidden.dtype)
        loss = hidden.new_zeros((), dtype=wide)
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_weight = torch.zeros_like(weight, dtype=wide) if need_weight else None
        for begin in range(0, hidden.shape[0], CHUNK):
            rows = slice(begin, begin + CHUNK)
            log_probs = torch.nn.functional.linear(hidden[rows], weight).log_softmax(-1, dtype=wide)
            chosen = log_probs.gather(1, targets[rows, None])
            loss -= (chosen if counts is None else chosen * counts[rows, None]).sum()
            if not any(ctx.needs_input_grad):
                continue
            d_logits = log_probs.exp_()
            d_logits[torch.arange(len(d_logits), device=d_logits.device), targets[rows]] -= 1
            d_logits = (d_logits if counts is None else d_logits * counts[rows, None]).to(hidden.dtype)
            if d_hidden is not None:
                d_hidden[rows] = d_logits @ weight
            if d_weight is not None:
                d_weight += d_logits.mT @ hidden[rows]
        ctx.save_for_backward(d_hidden, d_weight)
        return loss

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [None if g is None else g * d_loss.to(g.dtype) for g in ctx.saved_tensors]
        return *gradients, None, None

"""Next-token cross-entropy that never holds the logits of all tokens at once."""

from __future__ import annotations

import torch
from torch import Tensor

from .chunked_head import chunked_sum

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
    wide = torch.promote_types(hidden.dtype, torch.float32)

    def chunk_loss(logits: Tensor, chunk: slice, needs_gradient: bool) -> tuple[Tensor, Tensor | None]:
        # One name for both: the logits are dropped as soon as they are normalized.
        logits = logits.log_softmax(-1, dtype=wide)
        chosen = logits.gather(1, targets[chunk, None])
        loss = -(chosen if counts is None else chosen * counts[chunk, None]).sum()
        if not needs_gradient:
            return loss, None
        d_logits = logits.exp_()
        d_logits[torch.arange(len(d_logits), device=d_logits.device), targets[chunk]] -= 1
        return loss, d_logits if counts is None else d_logits * counts[chunk, None]

    return chunked_sum(hidden, weight, chunk_loss, CHUNK)

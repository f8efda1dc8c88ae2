"""Next-token cross-entropy, computed without holding the logits of all tokens at once."""

from __future__ import annotations

import torch
from torch import Tensor

from .chunked_head import chunked_sum

CHUNK = 1024
"""The number of tokens whose logits are held at a time."""


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, counts: Tensor | None = None) -> Tensor:
    """Return the sum of the cross-entropies of ``hidden @ weight.T`` against the targets.

    Args:
        hidden: Hidden states, ``(T, d)``.
        weight: The weight of the output layer, ``(V, d)``.
        targets: ``(T,)``, -100 at tokens without loss, which are not computed.
        counts: ``(T,)``, the weight of each token. The default is 1.

    Returns:
        A float32 scalar (float64 for float64 inputs), nats.
    """
    # A GPU is waited for once, for the number of rows. A mask as the index would wait here twice and in the backward.
    rows = (targets != -100).nonzero().squeeze(1)
    counts = None if counts is None else counts[rows]
    return learned_cross_entropy(hidden.index_select(0, rows), weight, targets[rows], counts)


def learned_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, counts: Tensor | None = None) -> Tensor:
    """Return `linear_cross_entropy` for targets of which none is -100."""
    wide = torch.promote_types(hidden.dtype, torch.float32)

    def chunk_loss(logits: Tensor, chunk: slice, needs_gradient: bool) -> tuple[Tensor, Tensor | None]:
        # Reassigning `logits` frees the unnormalized logits.
        logits = logits.log_softmax(-1, dtype=wide)
        chosen = logits.gather(1, targets[chunk, None])
        loss = -(chosen if counts is None else chosen * counts[chunk, None]).sum()
        if not needs_gradient:
            return loss, None
        d_logits = logits.exp_()
        d_logits[torch.arange(len(d_logits), device=d_logits.device), targets[chunk]] -= 1
        return loss, d_logits if counts is None else d_logits * counts[chunk, None]

    return chunked_sum(hidden, weight, chunk_loss, CHUNK)

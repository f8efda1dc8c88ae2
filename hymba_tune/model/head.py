"""The output layer, and what is computed in it without holding all logits at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .documents import Documents
from .log_probs import TokenScores, score_tokens
from .loss import linear_cross_entropy


class HymbaHead(nn.Linear):
    """The output layer. Losses are computed in it, which need its weight but never all logits at once."""

    def forward(self, hidden: Tensor, loss: Callable[[Tensor, Tensor], Any] | None = None) -> Any:
        """Return the logits ``(..., V)`` of hidden states, or what a loss makes of those and the weight ``(V, d)``."""
        return super().forward(hidden) if loss is None else loss(hidden, self.weight)


def head_loss(
    head: nn.Module,
    hidden: Tensor,
    labels: Tensor,
    documents: Documents,
    *,
    shifted: bool,
    weights: Tensor | None = None,
    items: Tensor | int | None = None,
) -> Tensor:
    """Return the cross-entropy of the next tokens.

    Args:
        head: The output layer, also with an adapter or in fewer bits.
        hidden: ``(B, L, d)``.
        labels: ``(B, L)``, -100 where nothing is learned.
        documents: Where the texts lie.
        shifted: Whether each label is what its own place is to predict, instead of the token there.
        weights: ``(B, L)``, how much each label counts; 1 when not given.
        items: What the sum is divided by; when not given, what the learned labels count.
    """
    align = documents.pack if shifted else documents.next_labels
    targets, states = align(labels), documents.pack(hidden)
    learned = targets != -100
    counts = None if weights is None else align(weights).where(learned, 0)
    if isinstance(head, HymbaHead):
        total = head(states, partial(linear_cross_entropy, targets=targets, counts=counts))
    else:  # such a head computes more than a product with its weight
        logits = head(states)
        losses = cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="none")
        total = losses.sum() if counts is None else losses @ counts
    if items is None:
        items = learned.sum().clamp(min=1) if counts is None else counts.sum()
    loss: Tensor = total / items
    return loss


def head_scores(head: nn.Module, hidden: Tensor, labels: Tensor, *, shifted: bool) -> TokenScores:
    """Return what `score_tokens` does.

    Raises:
        ValueError: If the head has an adapter or is stored in fewer bits.
    """
    if not isinstance(head, HymbaHead):
        raise ValueError(
            f"fused_lm_head reads the weight of lm_head, which is a {type(head).__name__} and computes more than a "
            "product with it; leave lm_head out of the adapter or the quantization"
        )
    scores: TokenScores = head(hidden, partial(score_tokens, labels=labels, shifted=shifted))
    return scores

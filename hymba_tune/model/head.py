"""The output layer, and the losses and scores that it computes without holding all logits at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .documents import Documents
from .few_rows import has_few_rows, is_plain, multiply
from .log_probs import TokenScores, score_tokens
from .loss import linear_cross_entropy


class HymbaHead(nn.Linear):
    """The output layer. It also computes losses that need its weight but never all logits at once."""

    def forward(self, hidden: Tensor, loss: Callable[[Tensor, Tensor], Any] | None = None) -> Any:
        """Return the logits ``(..., V)`` of hidden states, or a loss of the hidden states and the weight ``(V, d)``."""
        if loss is not None:
            return loss(hidden, self.weight)
        rows = hidden.flatten(0, -2)
        if has_few_rows(rows) and is_plain(self, HymbaHead) and hidden.dtype is self.weight.dtype:
            return multiply(rows, self.weight, self.bias).unflatten(0, hidden.shape[:-1])
        return super().forward(hidden)


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
        head: The output layer, which may have an adapter or be quantized.
        hidden: Hidden states, ``(B, L, d)``.
        labels: ``(B, L)``, -100 at tokens without loss.
        documents: The layout of the packed texts.
        shifted: Whether each label is the token that its position predicts, instead of the token at its position.
        weights: ``(B, L)``, the weight of each label. The default is 1.
        items: The divisor of the summed loss. The default is the sum of the weights of the labels.
    """
    align = documents.pack if shifted else documents.next_labels
    targets = align(labels)
    has_loss = targets != -100
    counts = None if weights is None else align(weights).where(has_loss, 0)

    states = documents.pack(hidden)
    if isinstance(head, HymbaHead):
        total = head(states, partial(linear_cross_entropy, targets=targets, counts=counts))
    elif hasattr(head, "token_adapter"):  # PEFT has replaced rows of the weight, and nothing else
        weight: Any = head.weight
        total = linear_cross_entropy(states, weight, targets=targets, counts=counts)
    else:
        # An adapted or quantized head computes more than a product with its weight, so it has to return logits.
        logits = head(states)
        losses = cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="none")
        total = losses.sum() if counts is None else losses @ counts

    if items is None:
        items = has_loss.sum().clamp(min=1) if counts is None else counts.sum()
    loss: Tensor = total / items
    return loss


def head_scores(head: nn.Module, hidden: Tensor, labels: Tensor, *, shifted: bool) -> TokenScores:
    """Return the `TokenScores` of the labels; see `score_tokens`.

    Raises:
        ValueError: If the head has an adapter or is quantized.
    """
    if hasattr(head, "token_adapter"):  # PEFT has replaced rows of the weight, and nothing else
        weight: Any = head.weight
        return score_tokens(hidden, weight, labels=labels, shifted=shifted)
    if not isinstance(head, HymbaHead):
        raise ValueError(
            f"fused_lm_head reads the weight of lm_head, which is a {type(head).__name__} and computes more than a "
            "product with it; leave lm_head out of the adapter or the quantization"
        )
    scores: TokenScores = head(hidden, partial(score_tokens, labels=labels, shifted=shifted))
    return scores

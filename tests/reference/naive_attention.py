"""Attention from one dense mask and a plain softmax."""

from __future__ import annotations

import torch
from torch import Tensor


def naive_attention(query: Tensor, key: Tensor, value: Tensor, meta: int, window: int | None) -> Tensor:
    """Compute attention over one text after its meta tokens.

    Args:
        query: ``(rows, H, a)``.
        key: ``(rows, G, a)``.
        value: ``(rows, G, v)``.
        meta: The number of meta tokens, which are the first rows.
        window: The number of earlier tokens that a query sees; None for the whole text. Meta tokens are always visible.

    Returns:
        ``(rows, H, v)``.
    """
    rows, heads, width = query.shape
    i, j = torch.arange(rows)[:, None], torch.arange(rows)
    visible = j <= i
    if window is not None:
        visible &= (i - j <= window) | (j < meta)
    outputs = []
    for head in range(heads):
        group = head // (heads // key.shape[1])
        scores = query[:, head] @ key[:, group].T / width**0.5
        outputs.append(scores.masked_fill(~visible, float("-inf")).softmax(-1) @ value[:, group])
    return torch.stack(outputs, 1)

"""Attention of one new token of each text over the meta tokens and a cache.

Glossary: S texts, M meta tokens, H query heads, G key/value heads, C columns of a buffer, a width of a query or key
head, v width of a value head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import cached_attention


def attend(
    query: Tensor, meta: tuple[Tensor, Tensor] | None, key: Tensor, value: Tensor, lengths: Tensor, window: int | None
) -> Tensor:
    """Attend to the meta tokens, and to the tokens of each text that are at most ``window`` before the new one.

    The new token of text s is in column ``lengths[s] % C`` of the buffers, and every column holds the newest token
    whose position is that column modulo C.

    Args:
        query: ``(S, H, a)``.
        meta: Keys ``(M, G, a)`` and values ``(M, G, v)`` of the meta tokens, or None if the model has none.
        key: ``(S, G, C, a)``.
        value: ``(S, G, C, v)``.
        lengths: ``(S,)`` int64, the number of tokens of each text before the new one.
        window: The number of earlier tokens that a query sees, or None for the whole text.

    Returns:
        ``(S, H * v)``.
    """
    # The age of a column is the number of tokens after the one that it holds.
    ages = (lengths[:, None] - torch.arange(key.shape[2], device=key.device)) % key.shape[2]
    hidden = ages > lengths[:, None]
    hidden = hidden if window is None else hidden | (ages > window)
    return cached_attention(query[:, None], meta, key, value, hidden[:, None]).squeeze(1)

"""Attention through PyTorch's `scaled_dot_product_attention`, on any device and dtype it has a kernel for.

It knows neither texts nor windows, only rows of one length and a mask. So every text becomes a row of its own behind a
copy of the meta tokens' keys and values: the classic layout, with a mask that grows with the square of the longest
text.

Glossary: M meta tokens, T text tokens, S texts, L longest text, H query heads, G key/value heads, a width of a query or
key head, v width of a value head.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .documents import Documents


def sdpa_attention(query: Tensor, key: Tensor, value: Tensor, documents: Documents, window: int | None) -> Tensor:
    """Attend as `packed_attention` says, with every text in a row of its own.

    Args:
        query: ``(M + T, H, a)``.
        key: ``(M + T, G, a)``.
        value: ``(M + T, G, v)``.
        documents: Where the texts lie.
        window: Tokens a query looks back, or None for the whole text.

    Returns:
        ``(M + T, H * v)``.
    """
    meta = documents.num_meta
    of_meta = _attend(query[None, :meta], key[None, :meta], value[None, :meta], None)
    keys, values = (_behind_meta(x[:meta], documents.to_grid(x[meta:])) for x in (key, value))
    of_texts = _attend(documents.to_grid(query[meta:]), keys, values, _visible(documents, window, query.device))
    return torch.cat([of_meta[0], documents.from_grid(of_texts)]).flatten(1)


def _attend(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None) -> Tensor:
    """Rows of queries ``(S, L, H, a)`` to their rows of keys ``(S, K, G, a)``; causal without a mask."""
    grouped = query.shape[2] != key.shape[2]
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    output = scaled_dot_product_attention(query, key, value, visible, is_causal=visible is None, enable_gqa=grouped)
    return output.transpose(1, 2)


def _behind_meta(meta: Tensor, grid: Tensor) -> Tensor:
    """``(S, M + L, ...)``: each text of an ``(S, L, ...)`` grid behind a copy of the meta tokens."""
    return torch.cat([meta.expand(grid.shape[0], *meta.shape), grid], 1)


def _visible(documents: Documents, window: int | None, device: torch.device) -> Tensor:
    """``(S, 1, L, M + L)`` bool, which keys each query of the grid sees; texts end flush at the right."""
    longest = max(documents.lengths)
    places = torch.arange(longest, device=device)
    visible = places <= places[:, None]
    if window is not None:
        visible &= places[:, None] - places <= window
    padding = places < longest - documents.cu_seqlens.diff()[:, None]
    # Padding sees padding, itself at least: a softmax over no key at all is NaN, and would reach every gradient.
    own = visible & (padding[:, :, None] | ~padding[:, None])
    return torch.nn.functional.pad(own, (documents.num_meta, 0), value=True)[:, None]

"""Attention through PyTorch's `scaled_dot_product_attention`, on every device and dtype for which it has a kernel.

The function supports neither packed texts nor windows, only rows of one length and a mask. Every text thus becomes
a row of its own, after a copy of the keys and values of the meta tokens. The size of the mask grows with the square of
the longest text.

Glossary: M meta tokens, T text tokens, S texts, L length of the longest text, H query heads, G key/value heads, a width
of a query or key head, v width of a value head.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .documents import Documents


def sdpa_attention(query: Tensor, key: Tensor, value: Tensor, documents: Documents, window: int | None) -> Tensor:
    """Compute `packed_attention` with every text in a row of its own.

    Args:
        query: ``(M + T, H, a)``.
        key: ``(M + T, G, a)``.
        value: ``(M + T, G, v)``.
        documents: The layout of the packed texts.
        window: The number of earlier tokens that a query sees, or None for the whole text.

    Returns:
        ``(M + T, H * v)``.
    """
    meta = documents.num_meta
    meta_output = _attend(query[None, :meta], key[None, :meta], value[None, :meta], None)

    keys, values = (_behind_meta(x[:meta], documents.to_grid(x[meta:])) for x in (key, value))
    visible = _visible(documents, window, query.device)
    text_output = _attend(documents.to_grid(query[meta:]), keys, values, visible)
    return torch.cat([meta_output[0], documents.from_grid(text_output)]).flatten(1)


def _attend(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None) -> Tensor:
    """Attend from rows of queries ``(S, L, H, a)`` to rows of keys ``(S, K, G, a)``; causal if there is no mask."""
    grouped = query.shape[2] != key.shape[2]
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    output = scaled_dot_product_attention(query, key, value, visible, is_causal=visible is None, enable_gqa=grouped)
    return output.transpose(1, 2)


def _behind_meta(meta: Tensor, grid: Tensor) -> Tensor:
    """Return ``(S, M + L, ...)``: each text of an ``(S, L, ...)`` grid after a copy of the meta tokens."""
    return torch.cat([meta.expand(grid.shape[0], *meta.shape), grid], 1)


def _visible(documents: Documents, window: int | None, device: torch.device) -> Tensor:
    """Return ``(S, 1, L, M + L)`` bool: the keys that each query of the left-padded grid sees."""
    longest = max(documents.lengths)
    columns = torch.arange(longest, device=device)
    visible = columns <= columns[:, None]
    if window is not None:
        visible &= columns[:, None] - columns <= window
    padding = columns < longest - documents.cu_seqlens.diff()[:, None]

    # Padding sees padding: a softmax over no key is NaN, which would reach every gradient.
    in_text = visible & (padding[:, :, None] | ~padding[:, None])
    return torch.nn.functional.pad(in_text, (documents.num_meta, 0), value=True)[:, None]

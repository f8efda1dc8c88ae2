"""Attention over the packed layout, and over a cache.

Glossary: M meta tokens, T text tokens, S texts, H query heads, G key/value heads, R = H / G queries a key head,
a width of a query or key head, v width of a value head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .attention_blocks import blocked_attention
from .attention_flash import flash_attention, flash_unavailable_reason, flash_unsupported_reason
from .attention_flex import flex_packed_attention, flex_unavailable_reason, flex_unsupported_reason
from .attention_native import native_attention, native_unavailable_reason
from .attention_sdpa import sdpa_attention
from .backends import GPU_DTYPES, Backend, Operation, Problem, Task, random_leaves
from .documents import Documents, find_documents
from .native import DTYPES


def packed_attention(query: Tensor, key: Tensor, value: Tensor, documents: Documents, window: int | None) -> Tensor:
    """Attend within each text and to the meta tokens.

    Query i sees key j if j is a meta token not after i, or stands in i's own text, not after i and at most ``window``
    tokens before it.

    Args:
        query: ``(M + T, H, a)``.
        key: ``(M + T, G, a)``.
        value: ``(M + T, G, v)``.
        documents: Where the texts lie.
        window: Tokens a query looks back, or None for the whole text.

    Returns:
        ``(M + T, H * v)``, in the query's dtype.
    """
    # Under autocast a head norm's float32 weight widens queries and keys.
    query, key = query.to(value.dtype), key.to(value.dtype)
    task = Task.of(query, key, value, widths=(query.shape[-1], value.shape[-1]))
    output: Tensor = ATTENTION.compute(task, query, key, value, documents, window)
    return output


def cached_attention(
    query: Tensor, meta: tuple[Tensor, Tensor] | None, key: Tensor, value: Tensor, hidden: Tensor
) -> Tensor:
    """Attend to the meta tokens, held once for the whole batch, and to each text's own cache.

    Args:
        query: ``(S, L, H, a)``.
        meta: Keys ``(M, G, a)`` and values ``(M, G, v)`` of the meta tokens, or None if the model has none.
        key: ``(S, G, K, a)``.
        value: ``(S, G, K, v)``.
        hidden: ``(S, L, K)`` bool, which keys a query does not see.

    Returns:
        ``(S, L, H * v)``.
    """
    count, length, _, width = query.shape
    groups = key.shape[1]
    # A group's queries are rows of one product with its keys, which are read where they lie.
    grouped = (query * width**-0.5).view(count, length, groups, -1, width).permute(0, 2, 3, 1, 4).flatten(2, 3)
    scores = grouped @ key.mT
    scores.unflatten(2, (-1, length)).masked_fill_(hidden[:, None, None], float("-inf"))
    wide = torch.promote_types(query.dtype, torch.float32)
    if meta is None:
        output = scores.softmax(-1, dtype=wide).to(value.dtype) @ value
    else:
        # The batch's queries are rows of one product with the meta tokens' keys.
        meta_key, meta_value = (held.transpose(0, 1) for held in meta)
        to_meta = grouped.transpose(0, 1).flatten(1, 2) @ meta_key.mT
        to_meta = to_meta.unflatten(1, (count, -1)).transpose(0, 1)
        weights = torch.cat([to_meta, scores], -1).softmax(-1, dtype=wide).to(value.dtype)
        on_meta, on_text = weights.split([to_meta.shape[-1], scores.shape[-1]], -1)
        output = (on_meta.transpose(0, 1).flatten(1, 2) @ meta_value).unflatten(1, (count, -1)).transpose(0, 1)
        output = output + on_text @ value
    heads_last: Tensor = output.unflatten(2, (-1, length)).permute(0, 3, 1, 2, 4)
    return heads_last.reshape(count, length, -1)


def _small_problem(task: Task) -> Problem:
    """Two texts, longer than the window, behind some meta tokens."""
    meta, tokens, groups, heads, (width, value_width) = 10, 150, 2, 10, task.widths
    shapes = [(meta + tokens, heads, width), (meta + tokens, groups, width), (meta + tokens, groups, value_width)]
    leaves = random_leaves(task, shapes)
    offsets = torch.tensor([0, 67, tokens], device=task.device)
    documents = find_documents((1, tokens), offsets.device, num_meta=meta, cu_seqlens=offsets)
    return Problem(lambda backend: (backend.run(*leaves, documents, 40),), leaves)


ATTENTION = Operation(
    "attention",
    [
        Backend(
            "flex",
            flex_packed_attention,
            ("cuda",),
            GPU_DTYPES,
            needs_self_test=True,
            unavailable_reason=flex_unavailable_reason,
            unsupported_reason=flex_unsupported_reason,
        ),
        Backend(
            "flash",
            flash_attention,
            ("cuda",),
            (torch.bfloat16, torch.float16),
            needs_self_test=True,
            unavailable_reason=flash_unavailable_reason,
            unsupported_reason=flash_unsupported_reason,
        ),
        Backend("native", native_attention, ("cpu",), DTYPES, unavailable_reason=native_unavailable_reason),
        Backend("blocks", blocked_attention),
        Backend("sdpa", sdpa_attention),
    ],
    plain="blocks",
    problem=_small_problem,
)
"""The ways to compute attention, the fastest first."""

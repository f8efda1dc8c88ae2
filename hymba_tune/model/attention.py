"""Attention over the packed layout, and over a cache.

Glossary: M meta tokens, T text tokens, S texts, H query heads, G key/value heads, R = H / G query heads per
key head, a width of a query or key head, v width of a value head.
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

    Query i sees key j in two cases: j is a meta token that is not after i, or j belongs to the same text as i, is not
    after i, and is at most ``window`` tokens before it.

    Args:
        query: ``(M + T, H, a)``.
        key: ``(M + T, G, a)``.
        value: ``(M + T, G, v)``.
        documents: The layout of the packed texts.
        window: The number of earlier tokens that a query sees, or None for the whole text.

    Returns:
        ``(M + T, H * v)``, in the query's dtype.
    """
    # Under autocast, the float32 weight of a head norm promotes queries and keys to float32.
    query = query.to(value.dtype)
    key = key.to(value.dtype)

    heads = query.shape[1], key.shape[1]
    task = Task.of(query, key, value, heads=heads, widths=(query.shape[-1], value.shape[-1]))
    output: Tensor = ATTENTION.compute(task, query, key, value, documents, window)
    return output


def cached_attention(
    query: Tensor, meta: tuple[Tensor, Tensor] | None, key: Tensor, value: Tensor, hidden: Tensor
) -> Tensor:
    """Attend to the meta tokens, which are stored once for the whole batch, and to the cache of each text.

    Args:
        query: ``(S, L, H, a)``.
        meta: Keys ``(M, G, a)`` and values ``(M, G, v)`` of the meta tokens, or None if the model has none.
        key: ``(S, G, K, a)``.
        value: ``(S, G, K, v)``.
        hidden: ``(S, L, K)`` bool, True for the keys that a query does not see.

    Returns:
        ``(S, L, H * v)``.
    """
    count, length, _, width = query.shape
    groups = key.shape[1]

    # The queries of a group are the rows of one matrix product with the keys of the group, which are not copied.
    grouped = (query * width**-0.5).view(count, length, groups, -1, width).permute(0, 2, 3, 1, 4).flatten(2, 3)
    scores = grouped @ key.mT
    scores.unflatten(2, (-1, length)).masked_fill_(hidden[:, None, None], float("-inf"))

    softmax_dtype = torch.promote_types(query.dtype, torch.float32)
    if meta is None:
        output = scores.softmax(-1, dtype=softmax_dtype).to(value.dtype) @ value
    else:
        # The queries of the whole batch are the rows of one matrix product with the keys of the meta tokens.
        meta_key, meta_value = (x.transpose(0, 1) for x in meta)
        meta_scores = grouped.transpose(0, 1).flatten(1, 2) @ meta_key.mT
        meta_scores = meta_scores.unflatten(1, (count, -1)).transpose(0, 1)
        weights = torch.cat([meta_scores, scores], -1).softmax(-1, dtype=softmax_dtype).to(value.dtype)

        meta_weights, text_weights = weights.split([meta_scores.shape[-1], scores.shape[-1]], -1)
        output = (meta_weights.transpose(0, 1).flatten(1, 2) @ meta_value).unflatten(1, (count, -1)).transpose(0, 1)
        output = output + text_weights @ value

    heads_last: Tensor = output.unflatten(2, (-1, length)).permute(0, 3, 1, 2, 4)
    return heads_last.reshape(count, length, -1)


def _small_problem(task: Task) -> Problem:
    """Return a problem of two texts that are longer than the window, after some meta tokens.

    As in a model, values are columns of the input projection's output, while queries and keys are normed.
    """
    meta, tokens = 10, 150
    heads, groups = task.heads
    width, value_width = task.widths
    rows = meta + tokens
    query, key, projected = random_leaves(
        task, [(rows, heads, width), (rows, groups, width), (rows, (groups + heads) * value_width)]
    )
    value = projected[:, : groups * value_width].unflatten(1, (groups, value_width))

    offsets = torch.tensor([0, 67, tokens], device=task.device)
    documents = find_documents((1, tokens), offsets.device, num_meta=meta, cu_seqlens=offsets)
    return Problem(lambda backend: (backend.run(query, key, value, documents, 40),), [query, key, projected])


ATTENTION = Operation(
    "attention",
    [
        Backend(
            "flex",
            flex_packed_attention,
            ("cuda",),
            GPU_DTYPES,
            slow_start=True,
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
"""The attention backends, the fastest first."""

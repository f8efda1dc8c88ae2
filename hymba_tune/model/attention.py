"""Attention over the packed layout, and over a cache.

Glossary: M meta tokens, T text tokens, S texts, H query heads, G key/value heads, R = H / G queries a key head,
a width of a query or key head, v width of a value head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .attention_blocks import blocked_attention
from .backends import Backend, Operation, Problem, Task
from .documents import Documents, find_documents


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
    backend = ATTENTION.choose(Task.of(query, key, value, widths=(query.shape[-1], value.shape[-1])))
    output: Tensor = backend.run(query, key, value, documents, window)
    return output


def cached_attention(
    query: Tensor, meta: tuple[Tensor, Tensor] | None, key: Tensor, value: Tensor, visible: Tensor
) -> Tensor:
    """Attend to the meta tokens, held once for the whole batch, and to each text's own cache.

    Args:
        query: ``(S, L, H, a)``.
        meta: Keys ``(M, G, a)`` and values ``(M, G, v)`` of the meta tokens, or None if the model has none.
        key: ``(S, K, G, a)``.
        value: ``(S, K, G, v)``.
        visible: ``(S, L, K)`` bool, which keys each query sees.

    Returns:
        ``(S, L, H * v)``.
    """
    meta_key, meta_value = meta or (key[0, :0], value[0, :0])
    count, length, heads, width = query.shape
    groups = key.shape[2]
    grouped = query.view(count, length, groups, heads // groups, width) * width**-0.5
    to_meta = torch.einsum("slgra,mga->sglrm", grouped, meta_key)
    to_text = torch.einsum("slgra,skga->sglrk", grouped, key)
    to_text = to_text.masked_fill(~visible[:, None, :, None], float("-inf"))
    weights = (
        torch.cat([to_meta, to_text], -1)
        .softmax(-1, dtype=torch.promote_types(query.dtype, torch.float32))
        .to(value.dtype)
    )
    on_meta, on_text = weights.split([meta_key.shape[0], key.shape[1]], -1)
    output = torch.einsum("sglrm,mgv->slgrv", on_meta, meta_value)
    output = output + torch.einsum("sglrk,skgv->slgrv", on_text, value)
    return output.reshape(count, length, -1)


def _small_problem(task: Task) -> Problem:
    """Two texts, longer than the window, behind some meta tokens."""
    generator = torch.Generator().manual_seed(0)
    meta, tokens, groups, heads, (width, value_width) = 10, 150, 2, 10, task.widths
    shapes = [(meta + tokens, heads, width), (meta + tokens, groups, width), (meta + tokens, groups, value_width)]
    leaves = [torch.randn(shape, generator=generator).to(task.device, task.dtype) for shape in shapes]
    for leaf in leaves:
        leaf.requires_grad_(task.gradients)
    offsets = torch.tensor([0, 67, tokens], device=task.device)
    documents = find_documents((1, tokens), offsets.device, num_meta=meta, cu_seqlens=offsets)
    return Problem(lambda backend: (backend.run(*leaves, documents, 40),), leaves)


ATTENTION = Operation(
    "attention",
    [
        Backend("blocks", blocked_attention),
    ],
    plain="blocks",
    problem=_small_problem,
)
"""The ways to compute attention, the fastest first."""

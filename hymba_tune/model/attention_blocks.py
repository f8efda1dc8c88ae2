"""Attention in blocks of queries: any device, any dtype, memory linear in the tokens.

Glossary: M meta tokens, T text tokens, H query heads, G key/value heads, R = H / G queries a key head, a width of a
query or key head, v width of a value head.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .documents import Documents

BLOCK = 128
"""Queries computed at a time."""


def blocked_attention(query: Tensor, key: Tensor, value: Tensor, documents: Documents, window: int | None) -> Tensor:
    """Attend as `packed_attention` says, a block of queries at a time to the one run of keys that it can see.

    No mask larger than one block of queries is built, and a windowed layer's time and memory grow linearly with T.
    """
    output: Tensor = _BlockedAttention.apply(query, key, value, documents, window)
    return output


def _softmax_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


class _BlockedAttention(torch.autograd.Function):
    """Blocks of queries against the one run of keys they can see. The backward computes the weights again."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, documents: Documents, window: int | None
    ) -> Tensor:
        rows, heads, _ = query.shape
        groups, value_dim = value.shape[1:]
        query, key, value = _by_group(query, groups), key.transpose(0, 1), value.transpose(0, 1)
        output = query.new_empty(rows, heads, value_dim)
        log_sums = query.new_empty(*query.shape[:3], dtype=_softmax_dtype(query))
        for block, keys, hidden in _blocks(documents, window, query.device):
            scores = _scores(query[:, :, block], _gather(key, keys), hidden)
            log_sums[:, :, block] = scores.logsumexp(-1)
            weights = scores.sub_(log_sums[:, :, block, None]).exp_().to(value.dtype)
            attended = weights.flatten(1, 2) @ _gather(value, keys)
            _by_group(output, groups)[:, :, block] = attended.view(*weights.shape[:3], value_dim)
        ctx.save_for_backward(query, key, value, output, log_sums)
        ctx.layout = documents, window
        return output.view(rows, -1)

    @staticmethod
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, log_sums = ctx.saved_tensors
        documents, window = ctx.layout
        groups, width = key.shape[0], query.shape[-1]
        d_output, output = _by_group(d_output.view_as(output), groups), _by_group(output, groups)
        # Softmax's backward needs each query's sum of its weights times their gradients, which is this dot product.
        inner = (d_output * output).sum(-1, dtype=log_sums.dtype)
        d_query, d_key, d_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for block, keys, hidden in _blocks(documents, window, query.device):
            block_query, block_key, block_output = query[:, :, block], _gather(key, keys), d_output[:, :, block]
            weights = _scores(block_query, block_key, hidden).sub_(log_sums[:, :, block, None]).exp_()
            block_output = block_output.flatten(1, 2)
            _scatter(d_value, keys, weights.to(value.dtype).flatten(1, 2).mT @ block_output)
            d_weights = (block_output @ _gather(value, keys).mT).view_as(weights)
            d_scores = weights.mul_(d_weights - inner[:, :, block, None]).mul_(width**-0.5).to(query.dtype)
            d_query[:, :, block] = (d_scores.flatten(1, 2) @ block_key).view_as(block_query)
            _scatter(d_key, keys, d_scores.flatten(1, 2).mT @ block_query.flatten(1, 2))
        d_query = d_query.permute(2, 0, 1, 3).flatten(1, 2)
        return d_query, d_key.transpose(0, 1), d_value.transpose(0, 1), None, None


def _by_group(tensor: Tensor, groups: int) -> Tensor:
    """``(rows, H, width)`` seen as ``(G, R, rows, width)``."""
    rows, _, width = tensor.shape
    return tensor.view(rows, groups, -1, width).permute(1, 2, 0, 3)


def _scores(query: Tensor, key: Tensor, hidden: Tensor) -> Tensor:
    """Scaled scores ``(G, R, queries, keys)``, minus infinity where hidden; the R heads share one product."""
    scores = (query.flatten(1, 2) @ key.mT).to(_softmax_dtype(query)).view(*query.shape[:3], -1)
    return scores.mul_(query.shape[-1] ** -0.5).masked_fill_(hidden, float("-inf"))


def _gather(tensor: Tensor, keys: tuple[slice, ...]) -> Tensor:
    parts = [tensor[:, part] for part in keys]
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


def _scatter(total: Tensor, keys: tuple[slice, ...], part: Tensor) -> None:
    widths = [piece.stop - piece.start for piece in keys]
    for piece, values in zip(keys, part.split(widths, 1), strict=True):
        total[:, piece] += values


def _blocks(
    documents: Documents, window: int | None, device: torch.device
) -> Iterator[tuple[slice, tuple[slice, ...], Tensor]]:
    """Blocks of queries, the runs of keys that any of a block sees, and ``(queries, keys)`` True where one does not."""
    meta = documents.num_meta
    rows = torch.arange(meta, device=device)
    for begin in range(0, meta, BLOCK):
        end = min(begin + BLOCK, meta)
        yield slice(begin, end), (slice(0, end),), rows[:end] > rows[begin:end, None]
    ids, total = documents.ids, documents.starts[-1]
    rows = torch.arange(total, device=device)
    text = 0
    for begin in range(0, total, BLOCK):
        end = min(begin + BLOCK, total)
        while documents.starts[text + 1] <= begin:
            text += 1
        first = documents.starts[text] if window is None else max(documents.starts[text], begin - window)
        queries, keys = rows[begin:end, None], rows[first:end]
        hidden = (keys > queries) | (ids[first:end] != ids[begin:end, None])
        if window is not None:
            hidden |= queries - keys > window
        runs = (slice(0, meta), slice(meta + first, meta + end)) if meta else (slice(first, end),)
        yield slice(meta + begin, meta + end), runs, torch.nn.functional.pad(hidden, (meta, 0))

"""Attention in blocks of queries: any device, any dtype, memory linear in the tokens.

Glossary: M meta tokens, T text tokens, H query heads, G key/value heads, R = H / G queries a key head, a width of a
query or key head, v width of a value head.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .autocast import outside_autocast
from .backends import kept
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
        rows, heads, width = query.shape
        groups, value_dim = value.shape[1:]
        query = _by_group(query * width**-0.5, groups)
        key, value = key.transpose(0, 1), value.transpose(0, 1)
        output = value.new_empty(rows, heads, value_dim)
        log_sums = query.new_empty(*query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))
        for block, keys, mask in _blocks(documents, window, log_sums):
            scores = _scores(query[:, :, block], _gather(key, keys), mask)
            highest = scores.amax(-1, keepdim=True)
            weights = scores.sub_(highest).exp_()
            sums = weights.sum(-1, keepdim=True)
            attended = (weights.to(value.dtype).flatten(1, 2) @ _gather(value, keys)).view(*sums.shape[:3], -1)
            _by_group(output, groups)[:, :, block] = attended / sums
            log_sums[:, :, block] = (highest + sums.log()).squeeze(-1)
        ctx.save_for_backward(query, key, value, output, log_sums)
        ctx.layout = documents, window
        return output.view(rows, -1)

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, log_sums = ctx.saved_tensors
        documents, window = ctx.layout
        groups = key.shape[0]
        d_output, output = _by_group(d_output.view_as(output), groups), _by_group(output, groups)
        # Softmax's backward needs each query's sum of its weights times their gradients, which is this dot product.
        inner = (d_output * output).sum(-1, dtype=log_sums.dtype)
        d_query, d_key, d_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for block, keys, mask in _blocks(documents, window, log_sums):
            block_query, block_key = query[:, :, block], _gather(key, keys)
            weights = _scores(block_query, block_key, mask).sub_(log_sums[:, :, block, None]).exp_()
            block_output = d_output[:, :, block].flatten(1, 2)
            _scatter(d_value, keys, weights.to(value.dtype).flatten(1, 2).mT @ block_output)
            d_weights = (block_output @ _gather(value, keys).mT).view_as(weights).to(weights.dtype)
            d_scores = weights.mul_(d_weights.sub_(inner[:, :, block, None])).to(query.dtype).flatten(1, 2)
            d_query[:, :, block] = (d_scores @ block_key).view_as(block_query)
            _scatter(d_key, keys, d_scores.mT @ block_query.flatten(1, 2))
        d_query = d_query.mul_(query.shape[-1] ** -0.5).permute(2, 0, 1, 3).flatten(1, 2)
        return d_query, d_key.transpose(0, 1), d_value.transpose(0, 1), None, None


def _by_group(tensor: Tensor, groups: int) -> Tensor:
    """``(rows, H, width)`` seen as ``(G, R, rows, width)``."""
    rows, _, width = tensor.shape
    return tensor.view(rows, groups, -1, width).permute(1, 2, 0, 3)


def _scores(query: Tensor, key: Tensor, mask: Tensor) -> Tensor:
    """Scores ``(G, R, queries, keys)``, the mask added to the last columns; the R heads share one product."""
    scores = (query.flatten(1, 2) @ key.mT).to(mask.dtype).view(*query.shape[:3], -1)
    scores[..., scores.shape[-1] - mask.shape[-1] :] += mask
    return scores


def _gather(tensor: Tensor, keys: tuple[slice, ...]) -> Tensor:
    parts = [tensor[:, part] for part in keys]
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


def _scatter(total: Tensor, keys: tuple[slice, ...], part: Tensor) -> None:
    widths = [piece.stop - piece.start for piece in keys]
    for piece, values in zip(keys, part.split(widths, 1), strict=True):
        total[:, piece] += values


def _blocks(
    documents: Documents, window: int | None, like: Tensor
) -> Iterator[tuple[slice, tuple[slice, ...], Tensor]]:
    """Blocks of queries, the runs of keys that any of a block sees, and the mask of the last of these keys."""
    meta, starts = documents.num_meta, documents.starts
    for begin in range(0, meta, BLOCK):
        end = min(begin + BLOCK, meta)
        yield slice(begin, end), (slice(0, end),), _mask(end - begin, end - begin, (), None, like.dtype, like.device)
    text = 0
    for begin in range(0, starts[-1], BLOCK):
        end = min(begin + BLOCK, starts[-1])
        while starts[text + 1] <= begin:
            text += 1
        first = starts[text] if window is None else max(starts[text], begin - window)
        # All keys before the block are seen by all of it, if it is of one text and has no window.
        masked = begin if window is None and starts[text + 1] >= end else first
        borders = tuple(start - masked for start in takewhile(end.__gt__, starts[text + 1 :]))
        mask = _mask(end - begin, end - masked, borders, window, like.dtype, like.device)
        runs = (slice(0, meta), slice(meta + first, meta + end)) if meta else (slice(first, end),)
        yield slice(meta + begin, meta + end), runs, mask


@kept
def _mask(
    queries: int, keys: int, borders: tuple[int, ...], window: int | None, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """``(queries, keys)``: minus infinity where a query does not see a key, else zero; the last keys are their own.

    Few of them differ, so they are kept: making one takes as long as a block's products.

    Args:
        queries: Number of queries.
        keys: Number of keys.
        borders: The keys, but for the first, at which another text begins.
        window: Tokens a query looks back, or None for all.
        dtype: The dtype of the scores.
        device: The device of the scores.
    """
    rows = torch.arange(keys, device=device)
    texts = torch.bucketize(rows, torch.tensor(borders, device=device, dtype=rows.dtype), right=True)
    own = rows[keys - queries :, None]
    hidden = (rows > own) | (texts != texts[keys - queries :, None])
    if window is not None:
        hidden |= own - rows > window
    return torch.zeros(queries, keys, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))

"""Attention in blocks of queries, for any device and dtype. Its memory is linear in the number of tokens.

Glossary: M meta tokens, T text tokens, H query heads, G key/value heads, R = H / G query heads per key head, a width
of a query or key head, v width of a value head.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .autocast import outside_autocast
from .documents import Documents, to_device
from .memoized import memoized

BLOCK = 128
"""The number of queries in a block."""


def blocked_attention(query: Tensor, key: Tensor, value: Tensor, documents: Documents, window: int | None) -> Tensor:
    """Compute `packed_attention` for one block of queries at a time, with only the keys that the block can see.

    No mask is larger than one block of queries, so the time and memory of a windowed layer grow linearly with T.
    """
    output: Tensor = _BlockedAttention.apply(query, key, value, documents, window)
    return output


class _BlockedAttention(torch.autograd.Function):
    """Attention of blocks of queries to the keys that they can see. The backward recomputes the attention weights."""

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
        for block, key_runs, mask in _blocks(documents, window, log_sums):
            scores = _scores(query[:, :, block], _gather(key, key_runs), mask)
            highest = scores.amax(-1, keepdim=True)
            weights = scores.sub_(highest).exp_()
            sums = weights.sum(-1, keepdim=True)

            attended = (weights.to(value.dtype).flatten(1, 2) @ _gather(value, key_runs)).view(*sums.shape[:3], -1)
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

        # The softmax backward needs the sum of a query's weights times their gradients, which equals this dot product.
        inner = (d_output * output).sum(-1, dtype=log_sums.dtype)
        d_query, d_key, d_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for block, key_runs, mask in _blocks(documents, window, log_sums):
            block_query, block_key = query[:, :, block], _gather(key, key_runs)
            weights = _scores(block_query, block_key, mask).sub_(log_sums[:, :, block, None]).exp_()
            d_block = d_output[:, :, block].flatten(1, 2)
            _scatter(d_value, key_runs, weights.to(value.dtype).flatten(1, 2).mT @ d_block)

            d_weights = (d_block @ _gather(value, key_runs).mT).view_as(weights).to(weights.dtype)
            d_scores = weights.mul_(d_weights.sub_(inner[:, :, block, None])).to(query.dtype).flatten(1, 2)
            d_query[:, :, block] = (d_scores @ block_key).view_as(block_query)
            _scatter(d_key, key_runs, d_scores.mT @ block_query.flatten(1, 2))

        d_query = d_query.mul_(query.shape[-1] ** -0.5).permute(2, 0, 1, 3).flatten(1, 2)
        return d_query, d_key.transpose(0, 1), d_value.transpose(0, 1), None, None


def _by_group(tensor: Tensor, groups: int) -> Tensor:
    """View ``(rows, H, width)`` as ``(G, R, rows, width)``."""
    rows, _, width = tensor.shape
    return tensor.view(rows, groups, -1, width).permute(1, 2, 0, 3)


def _scores(query: Tensor, key: Tensor, mask: Tensor) -> Tensor:
    """Return scores ``(G, R, queries, keys)``, the mask added to the last columns. The R heads share one product."""
    scores = (query.flatten(1, 2) @ key.mT).to(mask.dtype).view(*query.shape[:3], -1)
    scores[..., scores.shape[-1] - mask.shape[-1] :] += mask
    return scores


def _gather(tensor: Tensor, runs: tuple[slice, ...]) -> Tensor:
    parts = [tensor[:, run] for run in runs]
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


def _scatter(total: Tensor, runs: tuple[slice, ...], values: Tensor) -> None:
    lengths = [run.stop - run.start for run in runs]
    for run, part in zip(runs, values.split(lengths, 1), strict=True):
        total[:, run] += part


def _blocks(
    documents: Documents, window: int | None, like: Tensor
) -> Iterator[tuple[slice, tuple[slice, ...], Tensor]]:
    """Yield each block of queries, the runs of keys that its queries see, and the mask of the last of these keys."""
    meta = documents.num_meta
    starts = documents.starts
    for begin in range(0, meta, BLOCK):
        end = min(begin + BLOCK, meta)
        yield slice(begin, end), (slice(0, end),), _mask(end - begin, end - begin, (), None, like.dtype, like.device)

    text = 0
    for begin in range(0, starts[-1], BLOCK):
        end = min(begin + BLOCK, starts[-1])
        while starts[text + 1] <= begin:
            text += 1
        first = starts[text] if window is None else max(starts[text], begin - window)

        # If the block belongs to one text and there is no window, all its queries see all keys before the block.
        masked = begin if window is None and starts[text + 1] >= end else first
        borders = tuple(start - masked for start in takewhile(end.__gt__, starts[text + 1 :]))
        mask = _mask(end - begin, end - masked, borders, window, like.dtype, like.device)

        runs = (slice(0, meta), slice(meta + first, meta + end)) if meta else (slice(first, end),)
        yield slice(meta + begin, meta + end), runs, mask


@memoized
def _mask(
    queries: int, keys: int, borders: tuple[int, ...], window: int | None, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return ``(queries, keys)``: minus infinity where a query does not see a key, else zero.

    The last keys are those of the queries themselves. Few masks differ, so they are memoized: making one takes as long
    as the products of a block.

    Args:
        queries: The number of queries.
        keys: The number of keys.
        borders: The keys, the first one excluded, at which another text begins.
        window: The number of earlier tokens that a query sees, or None for the whole text.
        dtype: The dtype of the scores.
        device: The device of the scores.
    """
    key_rows = torch.arange(keys, device=device)
    texts = torch.bucketize(key_rows, to_device(borders, device), right=True)
    query_rows = key_rows[keys - queries :, None]
    hidden = (key_rows > query_rows) | (texts != texts[keys - queries :, None])
    if window is not None:
        hidden |= query_rows - key_rows > window
    return torch.zeros(queries, keys, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))

"""Naive attention and its gradients, for the tests of every backend."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.reference.naive_attention import naive_attention


def naive(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], meta: int, window: int | None) -> Tensor:
    """Attend within the meta tokens, then within each text after them."""
    outputs = [naive_attention(query[:meta], key[:meta], value[:meta], meta, window)] if meta else []
    begin = meta
    for length in lengths:
        rows = torch.cat([torch.arange(meta), torch.arange(begin, begin + length)])
        outputs.append(naive_attention(query[rows], key[rows], value[rows], meta, window)[meta:])
        begin += length
    return torch.cat(outputs).flatten(1)


def with_gradients(inputs: tuple[Tensor, ...], output: Tensor) -> dict[str, Tensor]:
    """Return the output, and the gradients of a randomly weighted sum of it."""
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output)
    grads = torch.autograd.grad(output, inputs, weight)
    return dict(zip(("output", "query", "key", "value"), (output, *grads), strict=True))

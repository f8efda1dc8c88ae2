"""Layouts and inputs of attention, and naive attention with its gradients, for the tests of every backend."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hymba_tune.model.documents import Documents, find_documents
from tests.reference.naive_attention import naive_attention

LENGTHS = {
    "one_text_of_1": [1],
    "one_text_of_65": [65],
    "short_texts": [1, 1, 7, 65, 20, 1],
    "texts_across_blocks": [1, 150, 130, 1, 40],
}
WINDOWS = {"global": None, "window_of_0": 0, "window_of_1": 1, "window_of_20": 20, "window_beyond_all": 1000}
any_layout = pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
any_window = pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS.keys())
any_meta = pytest.mark.parametrize("meta", [0, 5])
MORE_THAN_A_BLOCK = 130


def documents(lengths: list[int], meta: int, device: str = "cpu") -> Documents:
    offsets = torch.tensor([0, *lengths], device=device).cumsum(0)
    return find_documents((1, sum(lengths)), offsets.device, num_meta=meta, cu_seqlens=offsets)


def random_inputs(rows: int, heads: int = 6, groups: int = 2, width: int = 8, value: int = 16) -> tuple[Tensor, ...]:
    """Return query, key and value, which are float64 leaves."""
    shapes = (rows, heads, width), (rows, groups, width), (rows, groups, value)
    return tuple(torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes)


def strided(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the inputs as columns of one wide matrix, like the outputs of a projection."""
    columns = torch.cat([x.flatten(1) for x in inputs], 1).split([x[0].numel() for x in inputs], 1)
    return tuple(part.unflatten(1, x.shape[1:]) for part, x in zip(columns, inputs, strict=True))


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

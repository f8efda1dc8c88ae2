from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hymba_tune.footprint.shapes import LiveBytes, without_memory
from hymba_tune.model import use_kernels
from tests.tiny import random_texts, tiny_model


def test_live_bytes_count_what_lives() -> None:
    tensor = torch.ones(100)
    with LiveBytes() as memory:
        one = tensor + 1
        two = one * 2
        del one
        view = two[:10]
        seen = tensor.view(10, 10)
    assert (memory.live, memory.peak) == (400, 800)
    del view, two, seen
    assert memory.live == 0


def test_saved_tensors_are_counted_until_the_backward() -> None:
    x = torch.ones(1000, requires_grad=True)
    with LiveBytes() as memory:
        total = (x.exp() * 2).sum()
        assert memory.live >= 4000
        total.backward()
    assert memory.live < 4000 + 4000 + 100  # x's gradient, and the tensors that `total` holds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_left_of_tensors_without_memory(dtype: torch.dtype) -> None:
    """Masks and borders of layouts are cached between calls: those of fake tensors must not be."""
    model, (text,) = tiny_model(), random_texts([20])

    def loss() -> Tensor:
        loss: Tensor = model(input_ids=text[None], labels=text[None]).loss
        return loss

    before = use_kernels(scan="torch")
    try:
        with without_memory(dtype, own_kernels=True):
            assert type(torch.ones(3)) is not Tensor
        with without_memory(dtype, own_kernels=False):
            hidden = torch.ones(2, 3)
        assert hidden.untyped_storage().device.type == "meta"
        assert use_kernels(scan="torch") == {"scan": "torch"}
    finally:
        use_kernels(**before)
    assert loss().isfinite()

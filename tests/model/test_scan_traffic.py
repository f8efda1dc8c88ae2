"""The bytes that the Triton scan reads and writes, counted over the tensors that each kernel is launched with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hymba_tune.model import scan_triton
from hymba_tune.model.scan_inputs import ScanInputs

KERNELS = ("chunk_ends", "carry", "outputs", "front_gradients", "input_gradients", "sum_projections", "sum_chunks")


def test_the_scan_moves_at_most_twice_the_bytes_of_its_inputs_and_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kernel reads or writes each of its tensors once: 10 and 18 bytes a token and channel are the least."""
    moved = 0

    class Counted:
        def __getitem__(self, _: Any) -> Counted:
            return self

        def __call__(self, *arguments: Any, **_: Any) -> None:
            nonlocal moved
            moved += sum(x.numel() * x.element_size() for x in arguments if isinstance(x, Tensor))

    for kernel in KERNELS:
        monkeypatch.setattr(scan_triton, kernel, Counted())
    rows, channels, states = 8192, 3200, 16
    u, z = torch.empty(2, rows, channels, dtype=torch.bfloat16)
    B, C = torch.empty(2, rows, states, dtype=torch.bfloat16)
    dt, A, D = torch.empty(rows, channels), torch.empty(channels, states), torch.empty(channels)
    leaves = [x.requires_grad_() for x in (u, dt, A, B, C, D, z)]
    y, _ = scan_triton.triton_scan(ScanInputs(*leaves, None, None, (0, 128, rows), fuses_meta_prefix=True))
    forward = moved / (rows * channels)
    torch.autograd.grad(y, leaves, torch.empty_like(y))
    backward = moved / (rows * channels) - forward

    assert forward <= 2 * 10, forward
    assert backward <= 2 * 18, backward

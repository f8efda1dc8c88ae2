"""Inputs of the scan, and the naive scan with its gradients, for the tests of every backend."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from tests.reference.naive_scan import naive_scan

CHANNELS, STATE = 5, 3
EVERYTHING = ("D", "z", "dt_bias", "initial")
WITHOUT = {
    "everything": (),
    "no_initial_state": ("initial",),
    "no_gate": ("z",),
    "no_skip": ("D",),
    "no_bias": ("dt_bias",),
    "bare": EVERYTHING,
}


def random_inputs(
    lengths: list[int],
    *,
    without: tuple[str, ...] = (),
    shared: bool = False,
    channels: int = CHANNELS,
    states: int = STATE,
) -> dict[str, Tensor]:
    """Return float64 leaves; with ``shared``, all texts have the same initial state."""
    tokens = sum(lengths)
    inputs = {
        "u": torch.randn(tokens, channels),
        "dt": torch.randn(tokens, channels),
        "A": -torch.rand(channels, states) - 0.1,
        "B": torch.randn(tokens, states),
        "C": torch.randn(tokens, states),
        "D": torch.randn(channels),
        "z": torch.randn(tokens, channels),
        "dt_bias": torch.randn(channels),
        "initial": torch.randn(channels, states) if shared else torch.randn(len(lengths), channels, states),
    }
    return {name: x.double().requires_grad_() for name, x in inputs.items() if name not in without}


def naive(inputs: dict[str, Tensor], lengths: list[int]) -> tuple[Tensor, Tensor]:
    outputs, finals = [], []
    for text, (begin, end) in enumerate(pairwise(torch.tensor([0, *lengths]).cumsum(0).tolist())):
        inputs_of_text = {name: x[begin:end] if name in ("u", "dt", "B", "C", "z") else x for name, x in inputs.items()}
        if "initial" in inputs_of_text and inputs_of_text["initial"].ndim == 3:
            inputs_of_text["initial"] = inputs_of_text["initial"][text]
        y, final = naive_scan(**inputs_of_text)
        outputs.append(y)
        finals.append(final)
    return torch.cat(outputs), torch.stack(finals)


def with_gradients(inputs: dict[str, Tensor], outputs: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Return the outputs, and the gradients of a randomly weighted sum of them."""
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(x.shape, generator=generator).to(x) for x in outputs]
    grads = torch.autograd.grad(outputs, list(inputs.values()), weights)
    return dict(zip(("y", "final state", *inputs), (*outputs, *grads), strict=True))

"""The causal depthwise convolution, one token and one tap at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def naive_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, initial: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Convolve one text.

    Args:
        x: ``(T, E)``.
        weight: ``(E, K)``.
        bias: ``(E,)``.
        initial: The inputs before the text, ``(K - 1, E)``. The default is zeros.

    Returns:
        ``(T, E)``, and the last K - 1 inputs, including those before the text.
    """
    taps = weight.shape[1]
    before = x.new_zeros(taps - 1, x.shape[1]) if initial is None else initial
    padded = torch.cat([before, x])
    y = torch.stack([sum(padded[t + k] * weight[:, k] for k in range(taps)) for t in range(x.shape[0])])
    return (y if bias is None else y + bias), padded[x.shape[0] :]

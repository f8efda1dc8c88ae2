"""Rotary position embeddings (arXiv 2104.09864) with the bases that Hymba knows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .configuration_hymba import HymbaConfig


def rotary_base(config: HymbaConfig, length: int) -> float:
    """The base for a text.

    "ntk" widens the base once, so that ``orig_max_position_embeddings`` stretches to ``max_position_embeddings``;
    "dynamic_ntk" stretches it to the text's own length, once that is longer.

    Args:
        config: The model's configuration.
        length: Tokens of the text, meta tokens counted.
    """
    trained = config.orig_max_position_embeddings or config.max_position_embeddings
    if config.rope_type == "ntk":
        reach = config.max_position_embeddings
    elif config.rope_type == "dynamic_ntk" and length > trained:
        reach = length
    else:
        return float(config.rope_theta)
    width = config.head_dim
    return float(config.rope_theta * (2 * reach / trained - 1) ** (width / (width - 2)))


def rotary_tables(positions: Tensor, base: float, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``(rows, 1, width)`` for heads of this width at these ``(rows,)`` positions."""
    wide = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, width, 2, device=positions.device, dtype=wide) / width
    angles = positions[:, None] / base**exponents
    angles = torch.cat([angles, angles], -1)[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(heads: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Turn ``(rows, heads, width)`` by its positions; feature i is paired with feature i + width / 2."""
    turned: Tensor = _Rotation.apply(heads, *tables)
    return turned


class _Rotation(torch.autograd.Function):
    """Its gradient is turned back by the same angles, so nothing else is kept."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(heads, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_turned: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _turned(d_turned, cos, sin, -1), None, None


def _turned(heads: Tensor, cos: Tensor, sin: Tensor, way: int) -> Tensor:
    turned = heads * cos
    first, second = heads.chunk(2, -1)
    first_turned, second_turned = turned.chunk(2, -1)
    first_sin, second_sin = sin.chunk(2, -1)
    first_turned.addcmul_(second, first_sin, value=-way)
    second_turned.addcmul_(first, second_sin, value=way)
    return turned.to(heads.dtype)

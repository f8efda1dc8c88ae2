"""Rotary position embeddings (arXiv 2104.09864) with the bases that Hymba knows."""

from __future__ import annotations

import torch
from torch import Tensor

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

"""Rotary position embeddings (arXiv 2104.09864) with the bases of Hymba."""

from __future__ import annotations

import torch
from torch import Tensor

from .configuration_hymba import HymbaConfig


def rotary_base(config: HymbaConfig, length: int) -> float:
    """Return the base for a text.

    "ntk" scales the base once, from ``orig_max_position_embeddings`` to ``max_position_embeddings``. "dynamic_ntk"
    scales it to the length of a text that is longer than the former.

    Args:
        config: The configuration of the model.
        length: The number of tokens of the text, including meta tokens.
    """
    trained = config.orig_max_position_embeddings or config.max_position_embeddings
    if config.rope_type == "ntk":
        target = config.max_position_embeddings
    elif config.rope_type == "dynamic_ntk" and length > trained:
        target = length
    else:
        return float(config.rope_theta)
    width = config.head_dim
    return float(config.rope_theta * (2 * target / trained - 1) ** (width / (width - 2)))


def rotary_tables(positions: Tensor, base: float, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cosines and sines ``(rows, 1, width)`` for heads of this width at these ``(rows,)`` positions."""
    wide = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, width, 2, device=positions.device, dtype=wide) / width
    angles = positions[:, None] / base**exponents
    angles = torch.cat([angles, angles], -1)[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)

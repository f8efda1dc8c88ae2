"""The memory of a teacher that stays loaded while its student is trained."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig

from hymba_tune.adapters import weights_of
from hymba_tune.checkpoint import choose_dtype
from hymba_tune.config import DistillConfig
from hymba_tune.distill.matching import Layers, match_bytes
from hymba_tune.distill.teacher import parameters_of
from hymba_tune.registry import TEACHERS, resolve_model

BITS = {"int8": 8.5, "nf4": 4.5, "fp4": 4.5}
"""Bits of a quantized weight, including its scales."""


def teacher_bytes(config: DistillConfig, teacher: Any, parameters: int, student: Any, device: torch.device) -> int:
    """Estimate the bytes that the teacher takes during training.

    Args:
        config: The run's settings.
        teacher: The teacher's configuration.
        parameters: The number of the teacher's parameters.
        student: The student's configuration.
        device: The device of both models.
    """
    if not config.keeps_teacher:
        return 0
    dtype = choose_dtype(config.teacher_dtype, device)
    weights = round(parameters * BITS.get(config.teacher_quantize or "", 8 * dtype.itemsize) / 8)
    if not config.match_hidden:
        return weights
    tokens = config.batch_size * config.max_length
    shapes = Layers.of(student), Layers.of(teacher)
    return weights + match_bytes(*shapes, tokens=tokens, dtype=dtype, optimizer=config.optimizer)


def plan_teacher(config: DistillConfig, student: Any, device: torch.device) -> int:
    """Return `teacher_bytes` from the two configurations, without loading the teacher."""
    if not config.keeps_teacher or not config.teacher:
        return 0
    source = resolve_model(config.teacher, flag="--teacher", aliases=TEACHERS)
    known = AutoConfig.from_pretrained(weights_of(source).folder, local_files_only=True)
    return teacher_bytes(config, known, parameters_of(known), student, device)

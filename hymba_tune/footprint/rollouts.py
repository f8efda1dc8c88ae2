"""The time of rollouts: the answers that are sampled before a training step."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hymba_tune.config import GRPOConfig, TrainingConfig
from hymba_tune.footprint.costs import cache_bytes
from hymba_tune.footprint.work import Speeds, token_work

WRITING_OVER_READING = 12
"""The time of a generated token on a CPU over that of a token that is read, with 16 texts at a time: 8 to 19 are
measured by benchmarks/decode.py."""


def rollout_seconds(config: TrainingConfig, model: Any, speeds: Speeds, weights: float) -> float:
    """Return the seconds for which answers are sampled, for each token that is trained on; 0 where none are.

    Args:
        config: The run's settings.
        model: The model.
        speeds: The speeds of the device.
        weights: The bytes of its weights.
    """
    if not isinstance(config, GRPOConfig):
        return 0.0
    parameters = float(sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear)))
    reading = 2 * parameters / speeds.operations
    texts, layers = config.answers_at_a_time, model.config.num_hidden_layers
    cache = cache_bytes(model.config, texts, config.max_length, torch.bfloat16.itemsize)
    written = token_work(weights, parameters, layers, texts, cache).seconds(speeds) / texts
    if not speeds.overlap:
        written = max(written, WRITING_OVER_READING * reading)
    share = config.max_new_tokens / config.max_length
    return (share * written + (1 - share) * reading) / config.iterations

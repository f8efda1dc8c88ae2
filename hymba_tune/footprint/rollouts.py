"""The memory and time of rollouts: the answers that are sampled before a training step."""

from __future__ import annotations

from typing import Any

from torch import nn

from hymba_tune.config import GRPOConfig, TrainingConfig

WRITING_OVER_READING = 12
"""The time of a generated token on a CPU over that of a token that is read, with 16 texts at a time: 8 to 19 are
measured by benchmarks/decode.py."""


def cache_bytes(config: Any, texts: int, length: int, itemsize: int) -> int:
    """Return the bytes of the cache of texts that are generated together.

    Args:
        config: The model's configuration.
        texts: The number of texts.
        length: The tokens of each text, with its prompt.
        itemsize: The bytes of a number.
    """
    layers = range(config.num_hidden_layers)
    unbounded = {config.kv_source(layer) for layer in layers if config.is_global(layer)}
    columns = 0
    for layer in {config.kv_source(layer) for layer in layers}:
        bounded = config.sliding_window is not None and layer not in unbounded
        columns += min(length, config.sliding_window + 1) if bounded else length
    keys = columns * config.num_key_value_heads * (config.head_dim + config.value_dim) * itemsize
    inner = config.mamba_expand * config.hidden_size
    states = len(layers) * inner * (config.mamba_d_state * 4 + (config.mamba_d_conv - 1) * itemsize)
    return int(texts * (keys + states))


def rollout_seconds(config: TrainingConfig, model: Any, rate: float, writing: float | None) -> float:
    """Return the seconds for which answers are sampled, for each token that is trained on; 0 where none are.

    Args:
        config: The run's settings.
        model: The model.
        rate: The floating-point operations a second.
        writing: The least seconds in which a batch of texts grows by a token; None for those of a CPU.
    """
    if not isinstance(config, GRPOConfig):
        return 0.0
    reading = 2.0 * sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear)) / rate
    written = WRITING_OVER_READING * reading if writing is None else max(reading, writing / config.answers_at_a_time)
    share = config.max_new_tokens / config.max_length
    return (share * written + (1 - share) * reading) / config.iterations

"""Random Hymba models small enough to run in milliseconds, without parameter values that would hide mistakes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hymba_tune.model import HymbaConfig, HymbaForCausalLM

CONFIG: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "sliding_window": 5,
    "global_attn_idx": [0, 3],
    "kv_reuse_group": [[1, 2]],
    "num_memory_tokens": 5,
    "mamba_d_state": 3,
    "mamba_dt_rank": 4,
    "max_position_embeddings": 64,
    "orig_max_position_embeddings": 16,
}

RELEASED = HymbaConfig(
    global_attn_idx=[0, 15, 31],
    kv_reuse_group=[[i, i + 1] for i in range(1, 15, 2)] + [[16, 17, 18]] + [[i, i + 1] for i in range(19, 31, 2)],
)
"""The configuration of the released 1.5B model."""


def tiny_model(dtype: torch.dtype = torch.float32, **overrides: Any) -> HymbaForCausalLM:
    """Return a model of `CONFIG` with random parameters, which are always the same for one configuration."""
    model = HymbaForCausalLM(HymbaConfig(**CONFIG | overrides)).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name or ".D." in name:
            values = 1 + 0.3 * noise
        elif "A_log" in name:
            values = 0.5 + 0.5 * noise
        elif parameter.ndim == 1 or "embed_tokens" in name or "memory_tokens" in name:
            values = 0.5 * noise
        else:
            values = noise / parameter[0].numel() ** 0.5
        parameter.data.copy_(values)
    return model.to(dtype)


def random_texts(lengths: Sequence[int], vocabulary: int = CONFIG["vocab_size"]) -> list[Tensor]:
    """Return texts ``(L,)`` of these lengths, without special tokens."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, vocabulary, (length,), generator=generator) for length in lengths]


def released_name(name: str) -> str:
    """Return the name of a parameter in released checkpoints, in which the meta tokens are a bare parameter."""
    return name.replace("memory_tokens.weight", "memory_tokens")


def gradients(model: HymbaForCausalLM) -> dict[str, Tensor | None]:
    """Return the gradient of every parameter by its released name."""
    return {released_name(name): parameter.grad for name, parameter in model.named_parameters()}

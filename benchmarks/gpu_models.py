"""The models of the GPU benchmark: Hymba at its released size and Llama-3.2-3B, with random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel

from hymba_tune.model import HymbaConfig

RELEASED: dict[str, Any] = {
    "global_attn_idx": [0, 15, 31],
    "kv_reuse_group": [
        *([layer, layer + 1] for layer in range(1, 15, 2)),
        [16, 17, 18],
        *([layer, layer + 1] for layer in range(19, 31, 2)),
    ],
}
"""The settings of `nvidia/Hymba-1.5B-Base` that differ from the defaults of `HymbaConfig`."""
TOY: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "sliding_window": 16,
    "num_memory_tokens": 8,
    "global_attn_idx": [0],
    "kv_reuse_group": [[1, 2]],
}
LLAMA: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
}
"""The settings of `meta-llama/Llama-3.2-3B`."""
TOY_LLAMA: dict[str, Any] = LLAMA | {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def hymba(device: torch.device, *, quick: bool) -> PreTrainedModel:
    """Hymba at its released size in bfloat16, or at a toy size."""
    return _random(HymbaConfig(**TOY if quick else RELEASED), device)


def llama(device: torch.device, *, quick: bool) -> PreTrainedModel:
    """Llama-3.2-3B in bfloat16 with PyTorch's SDPA, or a toy size."""
    return _random(LlamaConfig(**TOY_LLAMA if quick else LLAMA, attn_implementation="sdpa"), device)


def _random(config: PretrainedConfig, device: torch.device) -> PreTrainedModel:
    torch.manual_seed(0)
    with device:  # weights are initialized on the device
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.to(device)


def random_ids(model: PreTrainedModel, batch: int, length: int) -> Tensor:
    """Random token ids ``(batch, length)`` without special tokens."""
    return torch.randint(3, model.config.vocab_size, (batch, length), device=model.device)

"""Small random teachers of many families."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    PhiConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
)

from hymba_tune.model import HymbaConfig
from tests.distill.tokenizers import ALL
from tests.tiny import CONFIG

SHAPE: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
FAMILIES: dict[str, Callable[[int], PretrainedConfig]] = {
    "llama": lambda size: LlamaConfig(vocab_size=size, **SHAPE),
    "qwen2": lambda size: Qwen2Config(vocab_size=size, tie_word_embeddings=True, **SHAPE),
    "gpt2": lambda size: GPT2Config(vocab_size=size, n_embd=24, n_layer=2, n_head=4, n_positions=256),
    "hymba": lambda size: HymbaConfig(**{**CONFIG, "vocab_size": size, "max_position_embeddings": 256}),
    "cohere": lambda size: CohereConfig(vocab_size=size, logit_scale=0.25, pad_token_id=0, **SHAPE),
    "granite": lambda size: GraniteConfig(vocab_size=size, logits_scaling=8.0, **SHAPE),
    "gemma2": lambda size: Gemma2Config(vocab_size=size, head_dim=6, final_logit_softcapping=2.0, **SHAPE),
    "phi": lambda size: PhiConfig(vocab_size=size, **{**SHAPE, "num_attention_heads": 2}),
}


def random_model(family: str, size: int) -> PreTrainedModel:
    """A model whose logits differ by several nats, always the same one."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(FAMILIES[family](size)).eval()
        for parameter in model.parameters():
            parameter.data += torch.randn_like(parameter) * (0.4 if parameter.ndim > 1 else 0.1)
    return model.requires_grad_(False)


def tokenizer_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Outputs that its tokens need."""
    return 1 + max(tokenizer.get_vocab().values())


def save_teacher(folder: Path, family: str = "llama", tokenizer: str = "llama3", padding: int = 0) -> Path:
    """A random teacher with one of the small tokenizers; its output layer has some rows more than that."""
    random_model(family, tokenizer_size(ALL[tokenizer]) + padding).save_pretrained(folder)
    ALL[tokenizer].save_pretrained(folder)
    return folder

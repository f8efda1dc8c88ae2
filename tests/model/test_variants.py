"""Every variant of the architecture against the naive twin: logits, loss and all gradients."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tests.reference.naive_hymba import naive_hymba, naive_loss
from tests.tiny import gradients, random_texts, released_name, tiny_model
from tests.tolerances import TWINS

VARIANTS: dict[str, dict[str, Any]] = {
    "as_released": {},
    "rms_norm_of_heads": {"kq_norm": "rms"},
    "perhead_rms_norm_of_heads": {"kq_norm": "perhead-rms"},
    "plain_rope_by_null": {"rope_type": None},
    "plain_rope_by_name": {"rope_type": "default"},
    "dynamic_ntk_some_texts_long": {"rope_type": "dynamic_ntk"},
    "dynamic_ntk_all_texts_long": {"rope_type": "dynamic_ntk", "orig_max_position_embeddings": 4},
    "dynamic_ntk_all_texts_short": {"rope_type": "dynamic_ntk", "orig_max_position_embeddings": 40},
    "no_rope": {"rope": False},
    "other_rope_theta": {"rope_theta": 500.0},
    "relu2": {"mlp_hidden_act": "relu2"},
    "mamba_proj_bias": {"mamba_proj_bias": True},
    "no_conv_bias": {"mamba_conv_bias": False},
    "no_inner_layernorms": {"mamba_inner_layernorms": False},
    "group_of_three": {"kv_reuse_group": [[0, 1, 2]]},
    "groups_of_one": {"kv_reuse_group": [[1], [2]]},
    "no_groups": {"kv_reuse_group": None},
    "group_of_layers_apart": {"kv_reuse_group": [[0, 2], [1, 3]]},
    "global_consumer_of_windowed_producer": {"kv_reuse_group": [[2, 3]]},
    "windowed_consumer_of_global_producer": {"kv_reuse_group": [[0, 1]]},
    "normed_heads_of_consumers": {"kv_reuse_group": [[0, 1, 2]], "kq_norm": "perhead-rms"},
    "one_key_value_head": {"num_key_value_heads": 1},
    "as_many_key_value_heads": {"num_key_value_heads": 6},
    "narrow_heads": {"hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 3},
    "wide": {"hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 1, "intermediate_size": 20},
    "expand_1": {"mamba_expand": 1},
    "expand_3": {"mamba_expand": 3},
    "automatic_dt_rank": {"mamba_dt_rank": "auto", "hidden_size": 60},
    "large_state": {"mamba_d_state": 16},
    "no_meta_tokens": {"num_memory_tokens": 0},
    "one_meta_token": {"num_memory_tokens": 1},
    "two_meta_tokens": {"num_memory_tokens": 2},
    "no_window": {"sliding_window": None},
    "window_of_one": {"sliding_window": 1},
    "window_longer_than_text": {"sliding_window": 100},
    "all_layers_global": {"global_attn_idx": [0, 1, 2, 3]},
    "no_layer_global": {"global_attn_idx": None},
    "d_conv_1": {"mamba_d_conv": 1},
    "d_conv_2": {"mamba_d_conv": 2},
    "d_conv_7": {"mamba_d_conv": 7},
    "untied_head": {"tie_word_embeddings": False},
    "large_eps": {"rms_norm_eps": 1e-2},
}


TEXTS = random_texts([1, 14, 2, 12])
LABELS = [text.where(torch.arange(len(text)) % 3 > 0, -100) for text in TEXTS]


class Expected(NamedTuple):
    """The results of the naive twin in float64."""

    logits: list[Tensor]
    loss: Tensor
    gradients: dict[str, Tensor | None]


@functools.cache
def naive(variant: str) -> Expected:
    model = tiny_model(torch.float64, **VARIANTS[variant])
    weights = {released_name(name): parameter for name, parameter in model.named_parameters()}
    logits = [naive_hymba(weights, model.config.to_dict(), text).logits for text in TEXTS]
    loss = naive_loss(logits, LABELS)
    loss.backward()
    return Expected(logits, loss, gradients(model))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_model_equals_naive_twin(variant: str, dtype: torch.dtype) -> None:
    model = tiny_model(dtype, **VARIANTS[variant])

    output = model(
        pad_sequence(TEXTS, batch_first=True),
        attention_mask=pad_sequence([torch.ones_like(text) for text in TEXTS], batch_first=True),
        labels=pad_sequence(LABELS, batch_first=True),
    )
    output.loss.backward()

    expected = naive(variant)
    close, close_gradient = TWINS[dtype]
    for row, logits in enumerate(expected.logits):
        close.check(output.logits[row, : len(logits)], logits, f"logits of text {row}")
    close.check(output.loss, expected.loss, "loss")
    close_gradient.check_all(gradients(model), expected.gradients)

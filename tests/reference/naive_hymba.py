"""Hymba, implemented from its description: one text at a time, with every step in its simplest form.

It reads a dict of weights with the released names and a dict with the keys of the released config. It shares no code
with the package, and computes in the dtype of the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, silu

from tests.reference.naive_attention import naive_attention
from tests.reference.naive_convolution import naive_convolution
from tests.reference.naive_scan import naive_scan

Weights = Mapping[str, Tensor]
Config = Mapping[str, Any]


class NaiveOutput(NamedTuple):
    """The results of the model for one text of L tokens after M meta tokens."""

    logits: Tensor
    """``(L, V)``."""
    hidden_states: list[Tensor]
    """``(M + L, d)`` before each layer, and after the final norm."""


def naive_hymba(weights: Weights, config: Config, ids: Tensor) -> NaiveOutput:
    """Run the model over one text ``(L,)``."""
    meta = config["num_memory_tokens"]
    eps = config["rms_norm_eps"]
    embedding = weights["model.embed_tokens.weight"]
    hidden = embedding[ids]
    if meta:
        hidden = torch.cat([weights["model.memory_tokens"], hidden])
    hidden_states = [hidden]
    keys_and_values: dict[int, tuple[Tensor, Tensor]] = {}
    for number in range(config["num_hidden_layers"]):
        layer = _Layer(weights, config, number)
        hidden = hidden + layer.mixer(rms_norm(hidden, layer["input_layernorm.weight"], eps), keys_and_values)
        hidden = hidden + layer.mlp(rms_norm(hidden, layer["pre_moe_layernorm.weight"], eps))
        hidden_states.append(hidden)
    final = rms_norm(hidden, weights["model.final_layernorm.weight"], eps)
    head = embedding if config["tie_word_embeddings"] else weights["lm_head.weight"]
    return NaiveOutput(final[meta:] @ head.T, [*hidden_states[:-1], final])


def naive_loss(logits: list[Tensor], labels: list[Tensor]) -> Tensor:
    """Return the mean next-token cross-entropy over the targets of all texts, which exclude their first tokens."""
    losses = [cross_entropy(x[:-1], y[1:], reduction="sum") for x, y in zip(logits, labels, strict=True)]
    targets = sum(int((y[1:] != -100).sum()) for y in labels)
    return torch.stack(losses).sum() / targets


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Divide by the root mean square of the last dimension, then scale."""
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def rope(heads: Tensor, base: float) -> Tensor:
    """Rotate ``(rows, heads, width)`` by the index of the row; feature i is paired with i + width / 2."""
    rows, _, width = heads.shape
    half = width // 2
    angles = torch.tensor(
        [[[row / base ** (2 * i / width) for i in range(half)]] for row in range(rows)], dtype=heads.dtype
    )
    first, second = heads[..., :half], heads[..., half:]
    return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1)


def rope_base(config: Config, length: int) -> float:
    """The base for a text of this length, meta tokens included."""
    trained = config["orig_max_position_embeddings"]
    width = config["hidden_size"] // config["num_attention_heads"]
    if config["rope_type"] == "ntk":
        stretched = config["max_position_embeddings"]
    elif config["rope_type"] == "dynamic_ntk" and length > trained:
        stretched = length
    else:
        return float(config["rope_theta"])
    return float(config["rope_theta"] * (2 * stretched / trained - 1) ** (width / (width - 2)))


class _Layer:
    """One layer's weights by their short names, and what the layer computes from them."""

    def __init__(self, weights: Weights, config: Config, layer: int) -> None:
        self.weights, self.config, self.layer = weights, config, layer

    def __getitem__(self, name: str) -> Tensor:
        return self.weights[f"model.layers.{self.layer}.{name}"]

    def linear(self, x: Tensor, name: str) -> Tensor:
        y = x @ self[f"{name}.weight"].T
        return y + self[f"{name}.bias"] if f"model.layers.{self.layer}.{name}.bias" in self.weights else y

    def mlp(self, x: Tensor) -> Tensor:
        up = self.linear(x, "moe.experts.0.up_proj")
        if self.config["mlp_hidden_act"] == "relu2":
            return self.linear(torch.relu(up) ** 2, "moe.experts.0.down_proj")
        return self.linear(silu(self.linear(x, "moe.experts.0.gate_proj")) * up, "moe.experts.0.down_proj")

    def mixer(self, x: Tensor, keys_and_values: dict[int, tuple[Tensor, Tensor]]) -> Tensor:
        config = self.config
        eps = self.config["rms_norm_eps"]
        size, expand = config["hidden_size"], config["mamba_expand"]
        width = size // config["num_attention_heads"]
        key_size = config["num_key_value_heads"] * width
        group = next((group for group in config["kv_reuse_group"] or [] if self.layer in group), [self.layer])
        producer = self.layer == group[0]

        widths = [size, *([key_size, key_size * expand] if producer else [0, 0]), expand * size, expand * size]
        query, key, value, x, gate = self.linear(x, "mamba.in_proj").split(widths, -1)
        if producer:
            key = self.positioned(key.unflatten(-1, (-1, width)), "k_norm")
            keys_and_values[self.layer] = key, value.unflatten(-1, (-1, width * expand))
        query = self.positioned(query.unflatten(-1, (-1, width)), "q_norm")
        window = None if self.layer in config["global_attn_idx"] else config["sliding_window"]
        attended = naive_attention(query, *keys_and_values[group[0]], config["num_memory_tokens"], window).flatten(1)
        attended = rms_norm(attended, self["mamba.pre_avg_layernorm1.weight"], eps)
        scanned = rms_norm(self.ssm(x, gate), self["mamba.pre_avg_layernorm2.weight"], eps)
        return self.linear((attended + scanned) / 2, "mamba.out_proj")

    def positioned(self, heads: Tensor, norm: str) -> Tensor:
        """Normalize the heads, then rotate them by their positions."""
        if self.config["kq_norm"] != "none":
            weight = self[f"mamba.self_attn.{norm}.weight"]
            heads = rms_norm(heads, weight if weight.ndim == 1 else weight[0, :, 0], self.config["rms_norm_eps"])
        return rope(heads, rope_base(self.config, heads.shape[0])) if self.config["rope"] else heads

    def ssm(self, x: Tensor, gate: Tensor) -> Tensor:
        config = self.config
        eps = self.config["rms_norm_eps"]
        bias = self["mamba.conv1d.bias"] if config["mamba_conv_bias"] else None
        c = silu(naive_convolution(x, self["mamba.conv1d.weight"][:, 0], bias)[0])
        widths = [config["mamba_dt_rank"], config["mamba_d_state"], config["mamba_d_state"]]
        dt, B, C = self.linear(c, "mamba.x_proj.0").split(widths, -1)
        if config["mamba_inner_layernorms"]:
            dt = rms_norm(dt, self["mamba.dt_layernorm.weight"], eps)
            B = rms_norm(B, self["mamba.B_layernorm.weight"], eps)
            C = rms_norm(C, self["mamba.C_layernorm.weight"], eps)
        A = -torch.exp(self["mamba.A_log.0"])
        return naive_scan(c, self.linear(dt, "mamba.dt_proj.0"), A, B, C, self["mamba.D.0"], gate)[0]

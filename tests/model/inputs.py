"""Inputs that several tests of the model share."""

from __future__ import annotations

from hymba_tune.model import HymbaConfig


def expected_names(config: HymbaConfig) -> set[str]:
    """Return the names of the weights in a released checkpoint."""
    names = {"model.embed_tokens.weight", "model.final_layernorm.weight"}
    if config.num_memory_tokens:
        names.add("model.memory_tokens")
    if not config.tie_word_embeddings:
        names.add("lm_head.weight")
    layer = ["input_layernorm.weight", "pre_moe_layernorm.weight"]
    layer += [f"moe.experts.0.{name}_proj.weight" for name in ("up", "down")]
    layer += ["moe.experts.0.gate_proj.weight"] * (config.mlp_hidden_act == "silu")
    mixer = ["in_proj.weight", "out_proj.weight", "conv1d.weight", "x_proj.0.weight", "dt_proj.0.weight"]
    mixer += ["dt_proj.0.bias", "A_log.0", "D.0", "pre_avg_layernorm1.weight", "pre_avg_layernorm2.weight"]
    mixer += ["in_proj.bias", "out_proj.bias"] * config.mamba_proj_bias
    mixer += ["conv1d.bias"] * config.mamba_conv_bias
    mixer += [f"{name}_layernorm.weight" for name in ("dt", "B", "C")] * config.mamba_inner_layernorms
    mixer += ["self_attn.q_norm.weight", "self_attn.k_norm.weight"] * (config.kq_norm != "none")
    layer += [f"mamba.{name}" for name in mixer]
    return names | {f"model.layers.{i}.{name}" for i in range(config.num_hidden_layers) for name in layer}

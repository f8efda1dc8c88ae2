"""Configuration of Hymba: the keys of the released `config.json`, checked against what is implemented."""

# No `from __future__ import annotations` here: `strict` does not check types that are strings.

import math
import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

MAX_SIZE = 2**20
MAX_LAYERS = 1024
"""Limits far beyond any model: the sizes of a damaged file would fill the memory before its weights are looked at."""


@strict
class HymbaConfig(PreTrainedConfig):
    """Settings of a Hymba model (arXiv 2411.13676).

    Attributes:
        hidden_size: The width d of the residual stream; each of the ``num_attention_heads`` query heads is d / heads
            wide.
        sliding_window: The window of the windowed layers: a query sees itself, this many earlier tokens, and the meta
            tokens. With None, no layer has a window.
        global_attn_idx: The layers without a window.
        kv_reuse_group: Groups of layers; the first layer of a group computes keys and values, the others reuse them.
        num_memory_tokens: The number of learned meta tokens in front of every text.
        mamba_expand: The ratio of the width of the SSM to ``hidden_size``, and of the width of attention values to that
            of keys.
        mamba_dt_rank: The rank of the time step projection, or "auto" for a sixteenth of ``hidden_size``.
        kq_norm: The norm of queries and keys: "none", "rms" (one weight for all heads) or "perhead-rms".
        rope_type: The type of RoPE. None or "default" is plain RoPE; "ntk" scales the base once, from
            ``orig_max_position_embeddings`` to ``max_position_embeddings``; "dynamic_ntk" scales the base for each text
            by its length.
        mlp_hidden_act: The activation of the MLP: "silu" (gated) or "relu2" (squared ReLU without a gate).

    The other keys are those of the released checkpoints. Values that the released code does not implement are refused.
    """

    model_type = "hymba"
    # TRL reads this attribute from every model that is not part of transformers.
    auto_map: ClassVar[Mapping[str, str]] = MappingProxyType({})
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache", "past_key_values"]

    vocab_size: int = 32001
    hidden_size: int = 1600
    intermediate_size: int = 5504
    num_hidden_layers: int = 32
    num_attention_heads: int = 25
    num_key_value_heads: int = 5
    sliding_window: int | None = 1024
    global_attn_idx: list[int] | None = None
    kv_reuse_group: list[list[int]] | None = None
    kv_reuse_every_i_layer: int = -1
    kv_weight_reuse: bool = False
    num_memory_tokens: int = 128
    memory_tokens_interspersed_every: int = 0
    attn_hidden_size: int = -1
    kq_head_dim: int = -1
    v_head_dim: int = 128
    kq_norm: str = "none"
    rope: bool = True
    rope_theta: float | int = 10000.0
    rope_type: str | None = "ntk"
    max_position_embeddings: int = 8192
    orig_max_position_embeddings: int | None = 2048
    seq_length: int = 8192
    attention_dropout: float | int = 0.0
    num_mamba: int = 1
    mamba_expand: int = 2
    mamba_d_state: int = 16
    mamba_d_conv: int = 4
    mamba_dt_rank: int | str = "auto"
    mamba_conv_bias: bool = True
    mamba_proj_bias: bool = False
    mamba_inner_layernorms: bool = True
    use_mamba_kernels: bool = True
    hidden_act: str = "silu"
    mlp_hidden_act: str = "silu"
    num_experts: int = 1
    num_experts_per_tok: int = 1
    output_router_logits: bool = False
    router_aux_loss_coef: float | int = 0.0
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    use_cache: bool = True
    calc_logits_for_entire_prompt: bool = False
    attn_implementation_new: str = "flex"
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = 0
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        # The released file names its own code, an attention implementation that transformers does not have, and
        # `use_cache: false`; from_pretrained, save_pretrained and generate would follow each of them. The named code is
        # kept only where an export has copied this code next to the weights, since it then refers to this code.
        auto_map = kwargs.pop("auto_map", None)
        if self._auto_class is not None:
            self.auto_map = dict(auto_map or {})  # type: ignore[misc]  # an instance may override the class variable
        # A file could name a repository here, and transformers would run its code instead of this package's.
        for name in ("attn_implementation", "experts_implementation"):
            kwargs.pop(name, None)
            kwargs.pop(f"_{name}", None)
        self.use_cache = True
        # With one expert there is no load to balance, but trainers take a non-zero coefficient to mean a router.
        self.router_aux_loss_coef = 0.0
        if self.mamba_dt_rank == "auto":
            self.mamba_dt_rank = math.ceil(self.hidden_size / 16)
        self.global_attn_idx = list(self.global_attn_idx or [])
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Read the keys of a file as transformers does; an attention implementation that the caller names is kept."""
        requested = kwargs.pop("attn_implementation", None)
        read = super().from_dict(config_dict, **kwargs)
        config = read[0] if isinstance(read, tuple) else read
        config._attn_implementation = requested  # the model warns of it; one that the file names is dropped above
        return read

    @property
    def head_dim(self) -> int:
        """Return the width of a query or key head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def value_dim(self) -> int:
        """Return the width of a value head."""
        return self.head_dim * self.mamba_expand

    @property
    def ssm_size(self) -> int:
        """Return the width E of the SSM heads together, and of the attention heads' output."""
        return self.mamba_expand * self.hidden_size

    def is_global(self, layer: int) -> bool:
        """Return whether the layer attends without a window."""
        return self.sliding_window is None or layer in (self.global_attn_idx or [])

    def kv_source(self, layer: int) -> int:
        """Return the layer whose keys and values this layer uses: itself, or the first of its group."""
        return next((group[0] for group in self.kv_reuse_group or [] if layer in group), layer)

    def validate_architecture(self) -> None:
        """Check that the configuration can be built.

        Raises:
            ValueError: If it cannot; the message names the field, its value and what was expected.
        """
        for field, supported in {
            "num_experts": 1,
            "num_mamba": 1,
            "memory_tokens_interspersed_every": 0,
            "kv_reuse_every_i_layer": -1,
            "kv_weight_reuse": False,
            "attn_hidden_size": -1,
            "kq_head_dim": -1,
            "attention_dropout": 0,
        }.items():
            if getattr(self, field) != supported:
                raise ValueError(f"{field} is {getattr(self, field)}; only {supported} is supported")

        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        for field in (*sizes, "num_key_value_heads", "mamba_expand", "mamba_d_state", "mamba_d_conv", "mamba_dt_rank"):
            self._validate_size(field, 1, MAX_LAYERS if field == "num_hidden_layers" else MAX_SIZE)
        self._validate_size("num_memory_tokens", 0, MAX_SIZE)
        if self.sliding_window is not None:
            self._validate_size("sliding_window", 1, sys.maxsize)

        for field, choices in {
            "kq_norm": ("none", "rms", "perhead-rms"),
            "rope_type": (None, "default", "ntk", "dynamic_ntk"),
            "mlp_hidden_act": ("silu", "relu2"),
        }.items():
            if getattr(self, field) not in choices:
                raise ValueError(f"{field} is {getattr(self, field)!r}; expected one of {choices}")
        for field, divisor in {
            "hidden_size": "num_attention_heads",
            "num_attention_heads": "num_key_value_heads",
        }.items():
            if getattr(self, field) % getattr(self, divisor):
                raise ValueError(
                    f"{field} ({getattr(self, field)}) must be a multiple of {divisor} ({getattr(self, divisor)})"
                )
        if self.rope and (self.head_dim % 2 or self.head_dim < 4):
            raise ValueError(
                f"hidden_size / num_attention_heads is {self.head_dim}; "
                "RoPE rotates pairs, so it must be even and at least 4"
            )
        self._validate_layers()

    def _validate_size(self, field: str, least: int, most: int) -> None:
        if not isinstance(size := getattr(self, field), int) or size < least:
            raise ValueError(f"{field} is {size!r}; expected a whole number of at least {least}")
        if size > most:
            raise ValueError(f"{field} is {size!r}; expected at most {most:,}")

    def _validate_layers(self) -> None:
        layers = range(self.num_hidden_layers)
        if outside := [layer for layer in self.global_attn_idx or [] if layer not in layers]:
            raise ValueError(f"global_attn_idx names layers {outside}; the layers are 0 to {layers[-1]}")
        grouped = [layer for group in self.kv_reuse_group or [] for layer in group]
        if outside := [layer for layer in grouped if layer not in layers]:
            raise ValueError(f"kv_reuse_group names layers {outside}; the layers are 0 to {layers[-1]}")
        if len(set(grouped)) != len(grouped) or any(
            list(group) != sorted(group) for group in self.kv_reuse_group or []
        ):
            raise ValueError(
                f"kv_reuse_group is {self.kv_reuse_group}; each layer may be in one group only, after its producer"
            )


__all__ = ["HymbaConfig"]

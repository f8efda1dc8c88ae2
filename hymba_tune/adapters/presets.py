"""Targets of adapters, and PEFT's configuration for them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel

from hymba_tune.config import MetaTokens, Method
from hymba_tune.errors import ConfigError, did_you_mean
from hymba_tune.model import HymbaForSequenceClassification

MLP = ("gate_proj", "up_proj", "down_proj")
PRESETS = {
    "all": ("in_proj", "x_proj.0", "dt_proj.0", "out_proj", *MLP),
    "attention-ssm": ("in_proj", "x_proj.0", "dt_proj.0", "out_proj"),
    "attention": ("in_proj", "out_proj"),
    "ssm": ("in_proj", "x_proj.0", "dt_proj.0", "out_proj"),
    "mlp": MLP,
}
"""The names of the linear layers of each preset.

`attention` and `ssm` adapt only the rows of `in_proj` that belong to them (see `rows_outside`). Both adapt `out_proj`,
because each of its columns reads the mean of the attention and SSM outputs, and because adapters of attention usually
include the output projection. The two presets together are `attention-ssm`.
"""

META_TOKENS = "memory_tokens"


def lora_config(
    model: PreTrainedModel,
    *,
    targets: Sequence[str],
    method: Method,
    rank: int,
    alpha: float | None,
    dropout: float,
    rslora: bool,
    meta_tokens: MetaTokens,
    added_tokens: Sequence[int] = (),
) -> LoraConfig:
    """Return PEFT's configuration of an adapter.

    Args:
        model: The Hymba model to adapt. Its weights are not read, so it may be on the meta device. The head of a
            classifier is trained with the adapter.
        targets: One preset, or the ends of names of linear layers: `in_proj`, `x_proj.0`, `layers.3.mamba.in_proj`.
        method: The method: LoRA or DoRA.
        rank: The rank of every update.
        alpha: The numerator of the scale of updates, alpha / rank; twice the rank if None.
        dropout: The dropout on the inputs of adapters.
        rslora: Whether updates are scaled by alpha / sqrt(rank) instead (arXiv 2312.03732).
        meta_tokens: How meta tokens are trained: with LoRA, fully, or not at all. It is ignored for models without
            meta tokens.
        added_tokens: The tokens whose rows of the embedding and the head are trained.

    Raises:
        ConfigError: If a target names no linear layer of the model.
    """
    names = _resolve(targets, linear_names(model))
    if getattr(model.base_model, META_TOKENS) is None:
        meta_tokens = MetaTokens.frozen
    rows: Any = list(added_tokens) or None
    if rows and not model.config.tie_word_embeddings:
        rows = {"embed_tokens": rows, "lm_head": rows}
    return LoraConfig(
        task_type="SEQ_CLS" if isinstance(model, HymbaForSequenceClassification) else "CAUSAL_LM",
        target_modules=[*names, META_TOKENS] if meta_tokens == MetaTokens.lora else names,
        modules_to_save=[META_TOKENS] if meta_tokens == MetaTokens.full else None,
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        lora_dropout=dropout,
        use_rslora=rslora,
        use_dora=method == Method.dora,
        trainable_token_indices=rows,
    )


def linear_names(model: PreTrainedModel) -> list[str]:
    """Return the full names of the linear layers that can be adapted: all except the head, which is tied."""
    return [
        f"model.layers.{name}"
        for name, module in model.base_model.layers.named_modules()
        if isinstance(module, nn.Linear)
    ]


def kind_of(name: str) -> str:
    """Return the part of a module's name that all layers share: `x_proj.0` for `model.layers.3.mamba.x_proj.0`."""
    kind = re.search(r"[^.]+(\.\d+)?$", name)
    return kind.group() if kind else name


def rows_outside(targets: Sequence[str], widths: Sequence[int]) -> slice | None:
    """Return the rows of `in_proj` that a preset does not adapt.

    Args:
        targets: The targets, as `lora_config` takes them.
        widths: The number of rows of queries, keys, values, SSM input and gate, in this order (`HymbaMixer.widths`).

    Returns:
        None if all rows are adapted.
    """
    attention = sum(widths[:3])
    match list(targets):
        case ["attention"]:
            return slice(attention, None)
        case ["ssm"]:
            return slice(0, attention)
    return None


def _resolve(targets: Sequence[str], linear: Sequence[str]) -> list[str]:
    """Return module names for PEFT, which adapts a module if its name equals one of them or ends in it after a dot."""
    kinds = sorted({kind_of(name) for name in linear})
    if len(targets) == 1 and targets[0] in PRESETS:
        return [name for name in PRESETS[targets[0]] if name in kinds]
    expected = f"one preset ({', '.join(PRESETS)}) or module names ({', '.join(kinds)})"
    if not targets:
        raise ConfigError("targets: empty, so there is nothing to adapt.", expected=expected)
    for target in targets:
        if target in PRESETS:
            raise ConfigError(f"targets: {target} is a preset, which excludes other targets.", expected=expected)
        if not any(f".{name}".endswith(f".{target}") for name in linear):
            raise ConfigError(
                f"targets: the model has no linear layer called {target}.",
                expected=expected,
                fix=did_you_mean(target, [*kinds, *PRESETS]),
            )
    return list(dict.fromkeys(targets))

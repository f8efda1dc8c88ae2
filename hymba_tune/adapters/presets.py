"""Which modules an adapter changes, and PEFT's configuration for it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel

from hymba_tune.config import MetaTokens, Method
from hymba_tune.errors import ConfigError, did_you_mean

MLP = ("gate_proj", "up_proj", "down_proj")
PRESETS = {
    "all": ("in_proj", "x_proj.0", "dt_proj.0", "out_proj", *MLP),
    "attention-ssm": ("in_proj", "x_proj.0", "dt_proj.0", "out_proj"),
    "attention": ("in_proj", "out_proj"),
    "ssm": ("in_proj", "x_proj.0", "dt_proj.0", "out_proj"),
    "mlp": MLP,
}
"""Names of the linear layers of each preset.

`attention` and `ssm` take of `in_proj` only the rows of their side (see `rows_outside`). `out_proj` belongs to both:
every one of its columns reads the mean of the two sides, and without it a side could change what it computes but not
what the residual stream makes of it, as the output projection does in any attention adapter. So the two presets
together are `attention-ssm`.
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
) -> LoraConfig:
    """PEFT's configuration of an adapter.

    Args:
        model: The Hymba model to adapt; its weights are not looked at, so it may lie on the meta device.
        targets: One preset, or names of linear layers as they end: `in_proj`, `x_proj.0`, `layers.3.mamba.in_proj`.
        method: LoRA or DoRA.
        rank: Rank of every update.
        alpha: Updates are scaled by alpha / rank; twice the rank when None.
        dropout: Dropout on the adapters' inputs.
        rslora: Scale by alpha / sqrt(rank) instead (arXiv 2312.03732).
        meta_tokens: By LoRA, as a whole, or not at all. Models without meta tokens have none to train.

    Raises:
        ConfigError: If a target names no linear layer of the model.
    """
    names = _resolve(targets, linear_names(model))
    trained = MetaTokens.frozen if getattr(model.base_model, META_TOKENS) is None else meta_tokens
    return LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=[*names, META_TOKENS] if trained == MetaTokens.lora else names,
        modules_to_save=[META_TOKENS] if trained == MetaTokens.full else None,
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        lora_dropout=dropout,
        use_rslora=rslora,
        use_dora=method == Method.dora,
    )


def linear_names(model: PreTrainedModel) -> list[str]:
    """Full names of the linear layers that can be adapted: all but the head, which shares its weight."""
    return [
        f"model.layers.{name}"
        for name, module in model.base_model.layers.named_modules()
        if isinstance(module, nn.Linear)
    ]


def kind_of(name: str) -> str:
    """What a module is called in every layer: `x_proj.0` for `model.layers.3.mamba.x_proj.0`."""
    kind = re.search(r"[^.]+(\.\d+)?$", name)
    return kind.group() if kind else name


def rows_outside(targets: Sequence[str], widths: Sequence[int]) -> slice | None:
    """The rows of `in_proj` that a preset leaves as they are.

    Args:
        targets: As `lora_config` takes them.
        widths: Rows of the queries, keys, values, SSM input and gate, in this order (`HymbaMixer.widths`).

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
    """Names for PEFT, which takes a module if its name ends in one of them after a dot."""
    kinds = sorted({kind_of(name) for name in linear})
    if len(targets) == 1 and targets[0] in PRESETS:
        return [name for name in PRESETS[targets[0]] if name in kinds]
    expected = f"one preset ({', '.join(PRESETS)}) or module names ({', '.join(kinds)})"
    if not targets:
        raise ConfigError("targets: empty, so there is nothing to adapt.", expected=expected)
    for target in targets:
        if target in PRESETS:
            raise ConfigError(f"targets: {target} is a preset and stands alone.", expected=expected)
        if not any(f".{name}".endswith(f".{target}") for name in linear):
            raise ConfigError(
                f"targets: the model has no linear layer called {target}.",
                expected=expected,
                fix=did_you_mean(target, [*kinds, *PRESETS]),
            )
    return list(dict.fromkeys(targets))

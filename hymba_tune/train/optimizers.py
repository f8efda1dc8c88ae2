"""Optimizers, the learning rate of each kind of parameter, and how it falls."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

OPTIMIZERS = {
    "adamw": "adamw_torch",
    "adamw8bit": "adamw_bnb_8bit",
    "paged-adamw": "paged_adamw_32bit",
    "paged-adamw8bit": "paged_adamw_8bit",
    "lion": "lion_32bit",
    "lion8bit": "lion_8bit",
    "adafactor": "adafactor",
    "sgd": "sgd",
}
"""Names of optimizers, and transformers' for them; bitsandbytes has the paged ones, Lion and those in 8 bits."""

META_TOKENS = re.compile(r"(^|\.)memory_tokens\.")
SSM = re.compile(r"\.(A_log|D|conv1d|x_proj|dt_proj|dt_layernorm|B_layernorm|C_layernorm)\.")
"""What only the SSM reads and what makes its recurrence; in_proj and out_proj belong to both sides of a mixer."""
LORA_B = re.compile(r"\.lora_B\.")


@dataclass(frozen=True)
class Rates:
    """Peak learning rates.

    Attributes:
        base: Of whatever has none of its own.
        meta: Of the meta tokens, or of their adapter.
        ssm: Of what is inside the SSM: ``A_log``, ``D``, ``conv1d``, ``x_proj``, ``dt_proj`` and its norms, or the
            adapters of these.
        loraplus: What the rate of LoRA's B factors is multiplied by (LoRA+, arXiv 2402.12354). The meta tokens'
            embedding, whose factors have the other roles, keeps its rate.
    """

    base: float
    meta: float | None = None
    ssm: float | None = None
    loraplus: float | None = None

    def of(self, name: str) -> tuple[str, float]:
        """The kind of a parameter, in words, and its learning rate."""
        if META_TOKENS.search(name):
            return ("meta tokens", self.meta) if self.meta is not None else ("", self.base)
        kind, rate = ("ssm", self.ssm) if self.ssm is not None and SSM.search(name) else ("", self.base)
        if self.loraplus is not None and LORA_B.search(name):
            return f"{kind} B".strip(), rate * self.loraplus
        return kind, rate


def parameter_groups(
    model: nn.Module, rates: Rates, *, weight_decay: float, decayed: Iterable[str]
) -> list[dict[str, Any]]:
    """The trained parameters by kind, as optimizers take them.

    Args:
        model: With its adapter on.
        rates: Of each kind.
        weight_decay: Of the parameters in ``decayed``; the others have none.
        decayed: Names of parameters.

    Returns:
        Groups with ``name``, ``params``, ``lr`` and ``weight_decay``, none of them empty and each parameter in exactly
        one; those without a rate of their own first, as the first group's rate is the one that is logged.
    """
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    names = set(decayed)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        (kind, rate), decays = rates.of(name), name in names
        label = (kind or "all others") + ("" if decays else ", no decay")
        new = {"name": label, "params": [], "lr": rate, "weight_decay": weight_decay if decays else 0.0}
        groups.setdefault((kind, not decays), new)["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def describe_groups(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What `run.json` says of parameter groups: ``name``, ``parameters`` (how many), ``lr``, ``weight_decay``."""
    return [
        {"name": group["name"], "parameters": sum(p.numel() for p in group["params"])}
        | {key: group[key] for key in ("lr", "weight_decay")}
        for group in groups
    ]


def schedule(name: str, *, steps: int, warmup: float, decay: float, floor: float) -> tuple[str, dict[str, Any]]:
    """Transformers' name of a learning rate schedule, and its arguments.

    Args:
        name: One of the settings' ``lr_schedule``.
        steps: Of the whole run.
        warmup: Share of the steps over which the rate rises.
        decay: Share of the steps at the end over which ``wsd`` falls (as 1 - sqrt, arXiv 2405.18392).
        floor: What ``cosine`` and ``wsd`` fall to, as a share of the peak.
    """
    if name == "wsd":
        falling = min(round(decay * steps), steps - math.ceil(warmup * steps))
        shape = {"decay_type": "1-sqrt", "min_lr_ratio": floor}
        return "warmup_stable_decay", {"num_decay_steps": max(1, falling), **shape}
    if name == "cosine" and floor:
        return "cosine_with_min_lr", {"min_lr_rate": floor}
    return {"constant": "constant_with_warmup", "inverse-sqrt": "inverse_sqrt"}.get(name, name), {}

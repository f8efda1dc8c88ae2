"""Optimizers, the learning rate of each kind of parameter, and its schedule."""

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
"""Names of optimizers, and transformers' names; bitsandbytes provides Lion and the paged and 8-bit ones."""

META_TOKENS = re.compile(r"(^|\.)memory_tokens\.")
SSM = re.compile(r"\.(A_log|D|conv1d|x_proj|dt_proj|dt_layernorm|B_layernorm|C_layernorm)\.")
"""Parameters of the SSM alone; in_proj and out_proj belong to both the attention and the SSM."""
LORA_B = re.compile(r"\.lora_B\.")


@dataclass(frozen=True)
class Rates:
    """Peak learning rates.

    Attributes:
        base: The rate of all parameters without a separate one.
        meta: The rate of the meta tokens, or of their adapter.
        ssm: The rate of the SSM's ``A_log``, ``D``, ``conv1d``, ``x_proj``, ``dt_proj`` and norms, or of their
            adapters.
        loraplus: The factor of the rate of LoRA's B matrices (LoRA+, arXiv 2402.12354). It does not apply to the meta
            tokens' embedding, in whose adapter A and B have each other's role.
    """

    base: float
    meta: float | None = None
    ssm: float | None = None
    loraplus: float | None = None

    def of(self, name: str) -> tuple[str, float]:
        """Return the kind of a parameter, in words, and its learning rate."""
        if META_TOKENS.search(name):
            return ("meta tokens", self.meta) if self.meta is not None else ("", self.base)
        kind, rate = ("ssm", self.ssm) if self.ssm is not None and SSM.search(name) else ("", self.base)
        if self.loraplus is not None and LORA_B.search(name):
            return f"{kind} B".strip(), rate * self.loraplus
        return kind, rate


def optimizer_name(optimizer: str, device: str) -> str:
    """Return transformers' name of an optimizer on a type of device.

    On a GPU, AdamW is one kernel for many parameters: the adapters of Hymba are hundreds of small matrices.
    """
    return "adamw_torch_fused" if optimizer == "adamw" and device == "cuda" else OPTIMIZERS[optimizer]


def parameter_groups(
    model: nn.Module, rates: Rates, *, weight_decay: float, decayed: Iterable[str]
) -> list[dict[str, Any]]:
    """Return the trained parameters by kind, as optimizers take them.

    Args:
        model: The model, with its adapter.
        rates: The learning rates.
        weight_decay: The weight decay of the parameters in ``decayed``; the others have none.
        decayed: The names of the parameters with weight decay.

    Returns:
        Groups with ``name``, ``params``, ``lr`` and ``weight_decay``, none of them empty and each parameter in exactly
        one. Groups without a separate rate come first, as the first group's rate is logged.
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
    """Return parameter groups as in `run.json`: ``name``, ``parameters`` (a number), ``lr``, ``weight_decay``."""
    return [
        {"name": group["name"], "parameters": sum(p.numel() for p in group["params"])}
        | {key: group[key] for key in ("lr", "weight_decay")}
        for group in groups
    ]


def schedule(name: str, *, steps: int, warmup: float, decay: float, floor: float) -> tuple[str, dict[str, Any]]:
    """Return transformers' name of a learning rate schedule, and its arguments.

    Args:
        name: The schedule's name in the settings (``lr_schedule``).
        steps: The number of steps of the whole run.
        warmup: The share of steps over which the rate rises.
        decay: The share of steps at the end over which ``wsd`` falls (as 1 - sqrt, arXiv 2405.18392).
        floor: The final rate of ``cosine`` and ``wsd``, as a share of the peak.
    """
    if name == "wsd":
        falling = min(round(decay * steps), steps - math.ceil(warmup * steps))
        shape = {"decay_type": "1-sqrt", "min_lr_ratio": floor}
        return "warmup_stable_decay", {"num_decay_steps": max(1, falling), **shape}
    if name == "cosine" and floor:
        return "cosine_with_min_lr", {"min_lr_rate": floor}
    return {"constant": "constant_with_warmup", "inverse-sqrt": "inverse_sqrt"}.get(name, name), {}

"""Initializations of PEFT that change the base weights, a change that the adapter's files do not contain."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig
from peft.tuners.lora import LoraLayer

from hymba_tune.errors import CheckpointError

ADAPTER = "default"
"""PEFT's name for a model's only adapter."""
KEEPS_BASE = ("true", "false", "gaussian", "eva", "orthogonal", "mica")
"""Values of ``init_lora_weights`` that do not change the base weights, in lower case."""
CHANGES_BASE = ("pissa", "olora")
"""Values that subtract the initial factors from the base weights, deterministically."""
NOT_REPEATABLE = {
    "pissa_niter": "by a randomized decomposition",
    "corda": "by a decomposition of the activations on its training data",
    "lora_ga": "by the gradients on its training data",
    "loftq": "by quantizing them, which PEFT can repeat only on a GPU",
}
"""Values whose change of the base weights cannot be repeated, and how they make it."""


def changes_base(config: LoraConfig) -> bool:
    """Return whether PEFT changes the base weights whenever it loads such an adapter."""
    return _name(config) in CHANGES_BASE


def check_initialization(settings: Mapping[str, Any], folder: Path) -> None:
    """Refuse an adapter if the base weights that it was trained on cannot be reproduced.

    Args:
        settings: The contents of its adapter_config.json.
        folder: The adapter's folder, for the message.

    Raises:
        CheckpointError: If its ``init_lora_weights`` is unknown, or changed the base model in a way that cannot be
            repeated.
    """
    name = str(settings.get("init_lora_weights", True)).lower()
    if name in KEEPS_BASE or name in CHANGES_BASE:
        return
    for start, how in NOT_REPEATABLE.items():
        if name.startswith(start):
            raise CheckpointError(
                f"{folder}: its init_lora_weights, {name}, changed the weights of its base model {how}, "
                "and the adapter does not contain that change.",
                expected="an adapter for the unchanged base model",
                fix="save it with PEFT's save_pretrained and path_initial_model_for_weight_conversion, or merge it "
                "where it was trained; if its base_model_name_or_path is the changed model already, set "
                "init_lora_weights to true in adapter_config.json",
            )
    raise CheckpointError(
        f"{folder}: init_lora_weights {name!r} in adapter_config.json is unknown.",
        expected=f"one of {', '.join((*KEEPS_BASE, *CHANGES_BASE))}",
    )


def change_base(layer: LoraLayer, config: LoraConfig) -> None:
    """Change the base weights of an adapter as PEFT does whenever it loads one. The factors do not change.

    Args:
        layer: The adapted layer, whose base weights are in memory, in the dtype in which they are stored.
        config: The adapter's configuration.
    """
    if not changes_base(config) or ADAPTER not in layer.lora_A:  # PEFT does not change embeddings
        return
    factors = [layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight]
    trained = [factor.data for factor in factors]
    if _name(config) == "pissa":
        layer.pissa_init(ADAPTER, "pissa")
    else:
        layer.olora_init(ADAPTER)
    for factor, values in zip(factors, trained, strict=True):
        factor.data = values


def _name(config: LoraConfig) -> str:
    return str(config.init_lora_weights).lower()

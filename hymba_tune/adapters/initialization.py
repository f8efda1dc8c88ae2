"""What PEFT's ways to initialize an adapter do to the weights below it, which the adapter's files do not hold."""

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
"""Values of ``init_lora_weights`` that leave the weights below the adapter as they are, in lower case."""
CHANGES_BASE = ("pissa", "olora")
"""Those that take the adapter's first factors out of the weights, in a way that gives the same each time."""
NOT_REPEATABLE = {
    "pissa_niter": "by a decomposition that draws random numbers",
    "corda": "by a decomposition of the activations on its training data",
    "lora_ga": "by the gradients on its training data",
    "loftq": "by quantizing them, which PEFT repeats on a GPU only",
}
"""Those whose change of the weights cannot be repeated, and how they make it."""


def changes_base(config: LoraConfig) -> bool:
    """Whether PEFT changes the weights below such an adapter each time that it loads one."""
    return _name(config) in CHANGES_BASE


def check_initialization(settings: Mapping[str, Any], folder: Path) -> None:
    """Refuse an adapter whose base model, as it was while the adapter was trained, cannot be had.

    Args:
        settings: What its adapter_config.json holds.
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
                "and the adapter does not hold that change.",
                expected="an adapter that fits the unchanged base model",
                fix="save it by PEFT's save_pretrained with path_initial_model_for_weight_conversion, or merge it "
                "where it was trained; if its base_model_name_or_path is the changed model already, set "
                "init_lora_weights to true in adapter_config.json",
            )
    raise CheckpointError(
        f"{folder}: init_lora_weights {name!r} in adapter_config.json is unknown.",
        expected=f"one of {', '.join((*KEEPS_BASE, *CHANGES_BASE))}",
    )


def change_base(layer: LoraLayer, config: LoraConfig) -> None:
    """Change the weights below an adapter as PEFT does whenever it loads one; the adapter's factors stay as they are.

    Args:
        layer: With its base layer's weights in memory, in the number format that they are stored in.
        config: The adapter's configuration.
    """
    if not changes_base(config) or ADAPTER not in layer.lora_A:  # PEFT leaves embeddings as they are
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

"""Checks of an adapter's configuration file before PEFT reads it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from peft import LoraConfig
from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from hymba_tune.adapters.initialization import check_initialization
from hymba_tune.errors import CheckpointError

MERGEABLE = "an adapter on linear layers, embeddings or meta tokens, full copies of modules, or rows of tokens"
NOT_MERGEABLE = {
    "lora_bias": "trains a bias in lora_B",
    "target_parameters": "adapts parameters that are not weights of linear layers",
    "alora_invocation_tokens": "changes the model only after certain tokens (aLoRA)",
    "layer_replication": "repeats layers of its base model",
    "use_qalora": "pools the inputs of layers (QALoRA)",
    "use_bdlora": "splits the factors into blocks (BD-LoRA)",
    "megatron_config": "is for Megatron's layers",
    "arrow_config": "chooses among several adapters for each token (Arrow)",
    "kasa_config": "changes the weights of its base model (KaSA)",
    "velora_config": "compresses activations (VeLoRA)",
    "monteclora_config": "samples its weights (MonteCLoRA)",
}
"""Settings of adapters that cannot be merged unless they are off, and what such an adapter does."""


def read_settings(path: Path) -> dict[str, Any]:
    """Read an adapter_config.json, and check that PEFT can read it and that the adapter can be merged.

    Raises:
        CheckpointError: If it cannot be read, a value has the wrong type, or the adapter is of a kind that cannot be
            merged.
    """
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", fix="copy or download it again") from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path} cannot be read: it is a JSON {type(settings).__name__}.", expected="an object")
    if settings.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{path} is not a LoRA adapter: its peft_type is {str(settings.get('peft_type'))[:80]}.", expected="LORA"
        )
    if settings.get("task_type") == "SEQ_CLS":
        raise CheckpointError(
            f"{path.parent} is the adapter of a model that scores texts and writes none, such as a reward model.",
            expected="an adapter of a model that writes",
            fix="transformers and PEFT load it: see docs/preferences.md",
        )
    check_initialization(settings, path.parent)
    _check_types(settings, path)
    _check_pattern(settings, path)
    _check_kind(settings, path)
    return settings


def _check_types(settings: Mapping[str, Any], path: Path) -> None:
    try:
        _types().model_validate_json(json.dumps(settings), strict=True)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False)[0]
        name = ".".join(map(str, problem["loc"]))
        raise CheckpointError(
            f"{path}: {name} is {str(problem['input'])[:80]!r}.",
            expected=problem["msg"],
            fix="copy or download it again",
        ) from error


@cache
def _types() -> type[BaseModel]:
    """Return a model of the file with the types that PEFT documents, and stricter ones where it documents less."""
    hints: dict[str, Any] = get_type_hints(LoraConfig)
    hints |= {"lora_alpha": float, "rank_pattern": dict[str, int] | None, "alpha_pattern": dict[str, float] | None}
    checked = {name: hint for name, hint in hints.items() if not name.startswith("init_") and name != "runtime_config"}
    fields: dict[str, Any] = {name: (hint, None) for name, hint in checked.items()}
    return create_model("AdapterSettings", __config__=ConfigDict(extra="ignore", protected_namespaces=()), **fields)


def _check_pattern(settings: Mapping[str, Any], path: Path) -> None:
    for name in ("target_modules", "exclude_modules"):
        if isinstance(pattern := settings.get(name), str):
            try:
                re.compile(pattern)
            except re.error as error:
                raise CheckpointError(
                    f"{path}: {name} is no regular expression: {error}.", expected="one, or a list of names"
                ) from error


def _check_kind(settings: Mapping[str, Any], path: Path) -> None:
    """Refuse what merging cannot repeat, before PEFT warns about it or changes a model for it."""
    reasons = [f"{what}: {name} is set" for name, what in NOT_MERGEABLE.items() if settings.get(name)]
    if settings.get("bias", "none") != "none":
        reasons.append(f"trains biases: bias is {settings['bias']}")
    if reasons:
        raise CheckpointError(
            f"{path.parent} changes its base model in a way that cannot be merged: it {reasons[0]}.",
            expected=MERGEABLE,
        )

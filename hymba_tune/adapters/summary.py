"""Describes the trained parameters in one line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from transformers import PreTrainedModel

from hymba_tune.adapters.initialization import ADAPTER
from hymba_tune.adapters.presets import META_TOKENS, kind_of
from hymba_tune.adapters.vocabulary import trained_rows


def count_parameters(model: PreTrainedModel | PeftModel) -> tuple[int, int]:
    """Return the number of trained and of all parameters, including the adapter's; tied parameters count once."""
    return model.num_parameters(only_trainable=True), model.num_parameters()


def describe(model: PreTrainedModel | PeftModel, targets: Sequence[str]) -> str:
    """Describe the method, the adapted modules and the share of trained parameters in one line.

    Args:
        model: The model with its adapter, or without one if every weight is trained.
        targets: The targets, as `lora_config` takes them.
    """
    trainable, total = count_parameters(model)
    share = 100 * trainable / total
    method = _describe_adapter(model, targets) if isinstance(model, PeftModel) else "every weight"
    return f"{method} · {short_count(trainable)} trainable, {share:.{0 if share >= 10 else 1}f} %"


def _describe_adapter(model: PeftModel, targets: Sequence[str]) -> str:
    config = model.peft_config[ADAPTER]
    method = ("rs" if config.use_rslora else "") + ("DoRA" if config.use_dora else "LoRA")
    adapted = {name: module for name, module in model.get_base_model().named_modules() if isinstance(module, LoraLayer)}
    linear = [name for name, module in adapted.items() if ADAPTER in module.lora_A]
    kinds = {kind_of(name) for name in linear}
    layers = {name.split(".")[2] for name in linear}
    extent = f"{_count(kinds, 'kind')} × {_count(layers, 'layer')}"
    line = f"{method} r{config.r} on {', '.join(targets)} ({extent})"
    if added := trained_rows(config):
        line += f" + {_count(set(added), 'added token')}"
    tokens = getattr(model.get_base_model().base_model, META_TOKENS)
    if isinstance(tokens, ModulesToSaveWrapper):
        return f"{line} + full meta tokens"
    return f"{line} + meta tokens" if isinstance(tokens, LoraLayer) else line


def _count(names: set[Any], noun: str) -> str:
    return f"{len(names)} {noun}{'s' if len(names) != 1 else ''}"


def short_count(count: float) -> str:
    """Format a count with three digits and a unit: 912, 21.4M, 1.52B."""
    for unit in ("", "k", "M"):
        if count < 999.5:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g}B"

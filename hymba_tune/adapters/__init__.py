"""Adapters on plain PEFT: what they change, saving and loading, merging."""

from hymba_tune.adapters.attach import add_adapter, load_adapter, restrict_rows
from hymba_tune.adapters.merge import merge
from hymba_tune.adapters.moved import AdapterWatch
from hymba_tune.adapters.opening import base_of, merge_into, open_model, weights_of
from hymba_tune.adapters.presets import PRESETS, lora_config
from hymba_tune.adapters.summary import count_parameters, describe, short_count
from hymba_tune.adapters.updates import Update, adapter_updates, full_updates

__all__ = [
    "PRESETS",
    "AdapterWatch",
    "Update",
    "adapter_updates",
    "add_adapter",
    "base_of",
    "count_parameters",
    "describe",
    "full_updates",
    "load_adapter",
    "lora_config",
    "merge",
    "merge_into",
    "open_model",
    "restrict_rows",
    "short_count",
    "weights_of",
]

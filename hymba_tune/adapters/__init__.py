"""Adapters built on PEFT: their targets, saving and loading, merging."""

from hymba_tune.adapters.attach import add_adapter, check_tensors, load_adapter, restrict_rows
from hymba_tune.adapters.base_digest import FACT, base_digest, changed_base, describe_difference, files_of
from hymba_tune.adapters.folding import (
    base_of,
    check_onto,
    folded_weights,
    folders_of,
    folding_note,
    plain_config,
    quantized_base,
    reason_against_continuing,
    sources_of,
    tokenizer_folder,
    tokenizer_of,
    vocabulary_of,
    weights_of,
)
from hymba_tune.adapters.moved import AdapterWatch
from hymba_tune.adapters.opening import open_model
from hymba_tune.adapters.presets import PRESETS, lora_config
from hymba_tune.adapters.summary import count_parameters, describe, short_count
from hymba_tune.adapters.updates import Update, adapter_updates, full_updates
from hymba_tune.adapters.vocabulary import tokens_past, widen_vocabulary
from hymba_tune.adapters.weights import Weights, finite_tensor, released_name

__all__ = [
    "FACT",
    "PRESETS",
    "AdapterWatch",
    "Update",
    "Weights",
    "adapter_updates",
    "add_adapter",
    "base_digest",
    "base_of",
    "changed_base",
    "check_onto",
    "check_tensors",
    "count_parameters",
    "describe",
    "describe_difference",
    "files_of",
    "finite_tensor",
    "folded_weights",
    "folders_of",
    "folding_note",
    "full_updates",
    "load_adapter",
    "lora_config",
    "open_model",
    "plain_config",
    "quantized_base",
    "reason_against_continuing",
    "released_name",
    "restrict_rows",
    "short_count",
    "sources_of",
    "tokenizer_folder",
    "tokenizer_of",
    "tokens_past",
    "vocabulary_of",
    "weights_of",
    "widen_vocabulary",
]

"""Merges an adapter into its base model, one tensor at a time."""

from __future__ import annotations

import gc
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig
from transformers.utils import GENERATION_CONFIG_NAME

from hymba_tune.adapters import (
    base_of,
    changed_base,
    check_onto,
    finite_tensor,
    folded_weights,
    folders_of,
    open_model,
    plain_config,
    quantized_base,
    released_name,
    tokenizer_of,
    weights_of,
)
from hymba_tune.checkpoint import INDEX, choose_device, choose_dtype, load_config
from hymba_tune.config import MergeConfig, Onto
from hymba_tune.data import with_chat_template
from hymba_tune.data.training import Working
from hymba_tune.errors import CheckpointError
from hymba_tune.files import MODEL, check_folder, new_folder
from hymba_tune.files.checkpoints import at_checkpoint
from hymba_tune.hub.drift import MergeDrift, drift, logits_of, sample_texts, trained_model
from hymba_tune.hub.layout import SHARD
from hymba_tune.inputs import check_inputs
from hymba_tune.memory import give_back_freed_memory
from hymba_tune.registry import ModelSource, resolve_model
from hymba_tune.schemes import WeightQuantization


@dataclass(frozen=True)
class Merged:
    """The result of a merge.

    Attributes:
        folder: The written folder.
        size: The bytes of its weights.
        base: The quantization of the base weights in training, if there was one.
        onto: The weights that the adapter was merged into.
        drifts: The difference from the trained model for each kind of weights, if the adapter was trained on quantized
            ones.
        alone: Whether the adapter has no run directory, whose record would state the quantization.
        change: How the base model differs from the one that the adapter was trained on, if it does.
    """

    folder: Path
    size: int
    base: WeightQuantization | None
    onto: Onto
    drifts: dict[Onto, MergeDrift]
    alone: bool
    change: str | None = None


def merge(config: MergeConfig, working: Working) -> Merged:
    """Merge a model's adapters, and write safetensors with the released names, configuration and tokenizer.

    Args:
        config: The settings of the merge.
        working: Shows the progress of long steps.

    Raises:
        ConfigError: If the folder is not empty, or if the base model has no weights of the kind that --onto names.
        CheckpointError: If there is no adapter to merge, or it cannot be used. The folder then does not exist.
    """
    check_inputs(config)
    device = choose_device(config.device)
    check_folder(config.out, MODEL, overwrite=config.overwrite)
    source = resolve_model(at_checkpoint(config.model, config.checkpoint))
    if source.adapter is None:
        raise CheckpointError(
            f"{source.name} has no adapter, so there is nothing to merge.", expected="a run with an adapter"
        )
    base = quantized_base(source)
    onto = config.onto or (Onto.dequantized if base else Onto.original)
    check_onto(source, onto)
    tokenizer_of(source)  # raises, before anything is written, if the model lacks rows for tokens
    stored = load_config(weights_of(source)).dtype or torch.float32
    dtype = stored if config.dtype == "auto" else choose_dtype(config.dtype, device)
    give_back_freed_memory()
    with new_folder(config.out, overwrite=config.overwrite, inputs=folders_of(source)) as folder:
        drifts = _drifts(source, base, dtype, device, working) if base else {}
        with working("merging"):
            size = _write(source, onto, dtype, device, folder)
    below = base_of(source)
    change = changed_base(source, below, folders_of(below), whole=True)
    return Merged(config.out, size, base, onto, drifts, alone=source.dtype is None, change=change)


def _drifts(
    source: ModelSource, base: WeightQuantization, dtype: torch.dtype, device: torch.device, working: Working
) -> dict[Onto, MergeDrift]:
    """Compare both kinds of merge with the trained model, with one model in memory at a time."""
    texts = sample_texts(with_chat_template(tokenizer_of(source)))
    with working("computing logits of the trained model"):
        trained = logits_of(trained_model(source, base, device), texts)
    gc.collect()  # models contain reference cycles, so that del does not free them
    drifts = {}
    for onto in Onto if not base.stored else [Onto.dequantized]:
        with working(f"computing logits after merging into the {onto} weights"):
            drifts[onto] = drift(logits_of(open_model(source, dtype=dtype, device=device, onto=onto), texts), trained)
        gc.collect()
    return drifts


def _write(source: ModelSource, onto: Onto, dtype: torch.dtype, device: torch.device, folder: Path) -> int:
    """Write the model, one shard of weights at a time, and return the bytes of all weights."""
    config: PretrainedConfig = plain_config(source)
    config.dtype = dtype
    weights = folded_weights(source, onto, device=device)
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(config, dtype=dtype).state_dict()
    tensors = {released_name(name): tensor for name, tensor in state.items() if released_name(name) in weights}
    plan = split_torch_state_dict_into_shards(tensors, max_shard_size=SHARD)

    for file, names in plan.filename_to_tensors.items():
        shard = {name: finite_tensor(weights, name, dtype).contiguous() for name in names}
        save_file(shard, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    config.save_pretrained(folder)
    below = weights_of(source).folder
    if (below / GENERATION_CONFIG_NAME).is_file():
        GenerationConfig.from_pretrained(below).save_pretrained(folder)
    tokenizer_of(source).save_pretrained(folder)
    return int(plan.metadata["total_size"])

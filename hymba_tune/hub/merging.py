"""An adapter folded into its base model, as one model, without holding that model in memory."""

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
from hymba_tune.hub.drift import MergeDrift, drift, logits_of, sample_texts, trained_model
from hymba_tune.hub.layout import SHARD
from hymba_tune.inputs import check_inputs
from hymba_tune.memory import give_back_freed_memory
from hymba_tune.registry import ModelSource, resolve_model
from hymba_tune.schemes import WeightQuantization


@dataclass(frozen=True)
class Merged:
    """What came of a merge.

    Attributes:
        folder: Where it is.
        size: Bytes of its weights.
        base: The quantized weights that the adapter was trained on, if it was.
        onto: What it was folded into.
        drifts: How far from the trained model each way leads, if it was trained on quantized weights.
        alone: Whether the adapter came without its run, which would say so.
    """

    folder: Path
    size: int
    base: WeightQuantization | None
    onto: Onto
    drifts: dict[Onto, MergeDrift]
    alone: bool


def merge(config: MergeConfig, working: Working) -> Merged:
    """Write a model, its adapters folded in, as one: safetensors under the released names, config and tokenizer.

    Args:
        config: Which, how, and where to.
        working: Shows the steps that take long.

    Raises:
        ConfigError: If the folder holds something already, or the base has no weights of the kind that --onto names.
        CheckpointError: If there is no adapter to fold in, or it cannot be used. The folder is then not there.
    """
    check_inputs(config)
    device = choose_device(config.device)
    check_folder(config.out, MODEL, overwrite=config.overwrite)
    source = resolve_model(config.model)
    if source.adapter is None:
        raise CheckpointError(
            f"{source.name} has no adapter: it is one model already.", expected="a run with an adapter"
        )
    base = quantized_base(source)
    onto = config.onto or (Onto.dequantized if base else Onto.original)
    check_onto(source, onto)
    stored = load_config(weights_of(source)).dtype or torch.float32
    dtype = stored if config.dtype == "auto" else choose_dtype(config.dtype, device)
    give_back_freed_memory()
    with new_folder(config.out, overwrite=config.overwrite, inputs=folders_of(source)) as folder:
        drifts = _drifts(source, base, dtype, device, working) if base else {}
        with working("merging"):
            size = _write(source, onto, dtype, device, folder)
    return Merged(config.out, size, base, onto, drifts, alone=source.dtype is None)


def _drifts(
    source: ModelSource, base: WeightQuantization, dtype: torch.dtype, device: torch.device, working: Working
) -> dict[Onto, MergeDrift]:
    """How far from the trained model each way leads. No two models are in memory together."""
    texts = sample_texts(with_chat_template(tokenizer_of(source)))
    with working("asking the trained model"):
        trained = logits_of(trained_model(source, base, device), texts)
    gc.collect()  # a model is a circle of references, and stays until then
    found = {}
    for onto in Onto if not base.stored else [Onto.dequantized]:
        with working(f"asking it merged onto the {onto} weights"):
            found[onto] = drift(logits_of(open_model(source, dtype=dtype, device=device, onto=onto), texts), trained)
        gc.collect()
    return found


def _write(source: ModelSource, onto: Onto, dtype: torch.dtype, device: torch.device, folder: Path) -> int:
    """Write the tensors of one file after the other; bytes of all of them."""
    config: PretrainedConfig = plain_config(source)
    config.dtype = dtype
    weights = folded_weights(source, onto, device=device)
    with torch.device("meta"):
        laid_out = AutoModelForCausalLM.from_config(config, dtype=dtype).state_dict()
    planned = {released_name(name): tensor for name, tensor in laid_out.items() if released_name(name) in weights}
    plan = split_torch_state_dict_into_shards(planned, max_shard_size=SHARD)
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

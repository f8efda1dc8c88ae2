"""Models by any name, the adapters that runs have trained folded in."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from hymba_tune.adapters.attach import load_adapter
from hymba_tune.adapters.merge import merge
from hymba_tune.checkpoint import choose_device, choose_dtype, load_config, load_tokenizer, load_weights
from hymba_tune.config import MergeConfig
from hymba_tune.errors import CheckpointError
from hymba_tune.folders import new_folder
from hymba_tune.registry import ModelSource, resolve_model
from hymba_tune.schemes import stored_quantization


def base_of(source: ModelSource) -> ModelSource:
    """The model that an adapter belongs to.

    Raises:
        CheckpointError: If the adapter does not say.
        HymbaTuneError: If that model cannot be found.
    """
    if not source.base:
        raise CheckpointError(
            f"{source.adapter} does not say which model it belongs to.",
            expected="base_model_name_or_path in its adapter_config.json",
        )
    return resolve_model(source.base)


def weights_of(source: ModelSource) -> ModelSource:
    """The model below all adapters; errors are those of `base_of`."""
    while source.adapter is not None:
        source = base_of(source)
    return source


def open_model(
    source: ModelSource, *, dtype: torch.dtype, device: torch.device, quantization: BitsAndBytesConfig | None = None
) -> PreTrainedModel:
    """Load a model; where it is an adapter, its base model with the adapter folded in.

    Args:
        source: Of `resolve_model`.
        dtype: What it computes in.
        device: Where to.
        quantization: As `load_weights` takes it, for a model without an adapter.

    Raises:
        CheckpointError: If weights or adapter cannot be used; see `load_weights` and `load_adapter`.
    """
    if source.adapter is None:
        return load_weights(source, dtype=dtype, device=device, quantization=quantization)
    base = open_model(base_of(source), dtype=dtype, device=device)
    if stored_quantization(base.config) is not None:
        base = base.dequantize(dtype)  # PEFT would quantise the sum again, and round most of the adapter away
    return merge(load_adapter(base, source.adapter))


def merge_into(config: MergeConfig) -> Path:
    """Write a model, its adapters folded in, as one: safetensors under the released names, config and tokenizer.

    Returns:
        The folder.

    Raises:
        ConfigError: If the folder holds something already.
        CheckpointError: If there is no adapter to fold in, or it cannot be used.
    """
    source = resolve_model(config.model)
    if source.adapter is None:
        raise CheckpointError(
            f"{source.name} has no adapter: it is one model already.", expected="a run with an adapter"
        )
    device = choose_device(config.device)
    stored = load_config(weights_of(source)).dtype or torch.float32
    dtype = stored if config.dtype == "auto" else choose_dtype(config.dtype, device)
    with new_folder(config.out) as folder:
        open_model(source, dtype=dtype, device=device).save_pretrained(folder)
        load_tokenizer(source.folder).save_pretrained(folder)
    return config.out

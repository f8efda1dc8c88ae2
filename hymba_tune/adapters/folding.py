"""Adapters folded into what lies below them: which weights those are, where there is a choice, and the sums."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from hymba_tune.adapters.attach import read_config
from hymba_tune.adapters.initialization import changes_base
from hymba_tune.adapters.weights import FoldedWeights, RoundedWeights, StoredWeights, Weights
from hymba_tune.checkpoint import check_weights, load_config, load_tokenizer
from hymba_tune.config import Onto, Scheme
from hymba_tune.errors import CheckpointError, ConfigError
from hymba_tune.registry import ModelSource, fetch_weights, resolve_model
from hymba_tune.schemes import WeightQuantization, decide_quantization, stored_bytes

CPU = torch.device("cpu")
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
"""Files one of which is in every folder with a tokenizer."""
DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}


def base_of(source: ModelSource) -> ModelSource:
    """The model that an adapter belongs to.

    Raises:
        CheckpointError: If the adapter does not say, or its configuration cannot be used; see `read_config`.
        HymbaTuneError: If that model cannot be found.
    """
    if source.adapter is not None:
        read_config(source.adapter)
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


def tokenizer_of(source: ModelSource) -> PreTrainedTokenizerBase:
    """The tokenizer of a model: its own or, where an adapter has none, as PEFT saves it, that of its base model.

    Raises:
        CheckpointError: If there is none, or it cannot be read.
        HymbaTuneError: As `base_of`.
    """
    return load_tokenizer(tokenizer_folder(source))


def tokenizer_folder(source: ModelSource) -> Path:
    """The folder that `tokenizer_of` reads."""
    while source.adapter is not None and not any((source.folder / file).is_file() for file in TOKENIZERS):
        source = base_of(source)
    return source.folder


def folders_of(source: ModelSource) -> list[Path]:
    """The folders that a model is read from, those of the models below its adapters included."""
    folders = [source.folder]
    while source.adapter is not None:
        source = base_of(source)
        folders.append(source.folder)
    return folders


def quantized_base(source: ModelSource) -> WeightQuantization | None:
    """How the weights below an adapter were stored while it was trained; None if in full, or if nothing says.

    An adapter without its run's directory says nothing: only a base that is stored quantized is known then.

    Raises:
        CheckpointError: If the run's record cannot be understood, or the adapter's initialization changes weights that
            are quantized.
        HymbaTuneError: As `base_of`.
    """
    if source.adapter is None:
        return None
    below = base_of(source)
    config = load_config(below) if below.adapter is None else plain_config(below)
    try:
        dtype = DTYPES[source.dtype or str(torch.float32)]
        scheme = Scheme(source.quantized) if source.quantized else None
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"The run.json of {source.name} cannot be understood: {error}") from error
    base = decide_quantization(config, scheme, dtype)
    if base is not None and changes_base(adapter := read_config(source.adapter)):
        raise CheckpointError(
            f"{source.adapter}: its init_lora_weights, {adapter.init_lora_weights}, changes the weights of its base "
            f"model, and those of {source.base} are quantized.",
            expected="an adapter that was initialized in another way, or a base model that is not quantized",
        )
    return base


def check_onto(source: ModelSource, onto: Onto) -> None:
    """See that an adapter can be folded into weights of this kind.

    Raises:
        ConfigError: If its base has none.
    """
    base = quantized_base(source)
    if base is None and onto is Onto.dequantized:
        raise ConfigError(
            f"--onto dequantized: nothing says that {source.name} was trained on quantized weights.",
            expected="a run that was trained with --quantize, or on a quantized model",
            fix="leave it out; an adapter's folder is to be named by its run's directory",
        )
    if base is not None and base.stored and onto is Onto.original:
        raise ConfigError(
            f"--onto original: {source.base} is stored in {base.scheme}, and has no other weights.",
            fix="leave it out",
        )


def folding_note(source: ModelSource) -> str | None:
    """One line for whoever opens an adapter that was trained on quantized weights; None for all others.

    Raises:
        HymbaTuneError: As `quantized_base`.
    """
    while source.adapter is not None:
        if (base := quantized_base(source)) is not None:
            return f"{source.name}: folded into the weights it was trained on, {base.scheme} dequantized"
        source = base_of(source)
    return None


def folded_weights(source: ModelSource, onto: Onto = Onto.dequantized, *, device: torch.device = CPU) -> Weights:
    """A model's tensors, with its adapters folded in; each is computed when it is read.

    Weights and adapters of the Hub are downloaded first.

    Args:
        source: Of `resolve_model`.
        onto: Which weights an adapter that was trained on quantized ones is folded into; those below it always into
            the ones that they were trained on.
        device: Where weights are quantized to be dequantized again; all tensors are on the CPU.

    Raises:
        CheckpointError: If weights or adapter cannot be used; see `check_weights` and `load_adapter`.
        HubError: If they cannot be downloaded.
    """
    fetch_weights(source)
    if source.adapter is None:
        config = load_config(source)
        check_weights(source.folder, config)
        return StoredWeights(source.folder, config)
    below, base, config = folded_weights(base_of(source), device=device), quantized_base(source), plain_config(source)
    if base is not None and not base.stored and onto is Onto.dequantized:
        layers = stored_bytes(config, base.config).keys()
        below = RoundedWeights(below, base.config, layers, dtype=base.dtype, device=device)
    return FoldedWeights(below, config, source.adapter)


def plain_config(source: ModelSource) -> Any:
    """The configuration of a model that its adapters are folded into: not quantized."""
    config = copy.deepcopy(load_config(weights_of(source)))
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config

"""Merges adapters into the weights of their base models, tensor by tensor, and chooses which weights those are."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from hymba_tune.adapters.attach import read_config
from hymba_tune.adapters.base_digest import changed_base
from hymba_tune.adapters.initialization import changes_base
from hymba_tune.adapters.vocabulary import (
    EMBEDDING,
    HEAD,
    check_vocabulary,
    saved_vocabulary,
    tokens_past,
    trains,
    unties,
    vocabulary_with,
)
from hymba_tune.adapters.weights import FoldedWeights, RoundedWeights, StoredWeights, Weights
from hymba_tune.checkpoint import check_weights, load_config, load_tokenizer
from hymba_tune.config import Onto, Scheme
from hymba_tune.errors import CheckpointError, ConfigError
from hymba_tune.registry import ModelSource, fetch_weights, resolve_model
from hymba_tune.schemes import WeightQuantization, decide_quantization, stored_bytes

CPU = torch.device("cpu")
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
"""Files of a tokenizer; every folder with a tokenizer has at least one of them."""
DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}


def base_of(source: ModelSource) -> ModelSource:
    """Find the base model of an adapter.

    Raises:
        CheckpointError: If the adapter does not name it, or the adapter's configuration cannot be used; see
            `read_config`.
        HymbaTuneError: If the base model cannot be found.
    """
    if source.adapter is not None:
        read_config(source.adapter)
    if not source.base:
        raise CheckpointError(
            f"{source.adapter} does not name its base model.",
            expected="base_model_name_or_path in its adapter_config.json",
        )
    return resolve_model(source.base)


def sources_of(source: ModelSource) -> Iterator[ModelSource]:
    """Yield a model, its base model if it is an adapter, and so on down to the model with full weights.

    Raises:
        CheckpointError: If a model is its own base model, also through others; or as `base_of` does.
    """
    names: dict[Path, str] = {}
    while True:
        folder = source.folder.resolve()
        names[folder] = source.name
        yield source
        if source.adapter is None:
            return
        source = base_of(source)
        if source.folder.resolve() in names:
            raise CheckpointError(
                f"{source.adapter} is its own base model: {' -> '.join([*names.values(), source.name])}.",
                expected="adapters whose last base model has full weights",
                fix="correct base_model_name_or_path in adapter_config.json",
            )


def weights_of(source: ModelSource) -> ModelSource:
    """Find the model with full weights below all adapters; raises as `sources_of` does."""
    return list(sources_of(source))[-1]


def tokenizer_of(source: ModelSource, *, resize: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model. An adapter without a tokenizer, as PEFT saves it, has that of its base model.

    Args:
        source: The model.
        resize: Whether the tokenizer may have tokens for which the model has no rows.

    Raises:
        CheckpointError: If there is no tokenizer, it cannot be read, or the model has no row for one of its tokens.
        HymbaTuneError: If the base model cannot be found; see `sources_of`.
    """
    tokenizer = load_tokenizer(tokenizer_folder(source))
    if not resize and tokens_past(tokenizer, vocabulary_of(source)):
        for adapter in sources_of(source):
            if adapter.adapter is not None:  # its weights may contain a resized embedding
                fetch_weights(adapter)
        check_vocabulary(tokenizer, vocabulary_of(source), source.name)
    return tokenizer


def vocabulary_of(source: ModelSource) -> int:
    """Return the number of tokens for which a model has rows, including those that its adapters add.

    Raises:
        CheckpointError: If an adapter adds a token without those before it.
        HymbaTuneError: If a base model cannot be found; see `sources_of`.
    """
    return int(plain_config(source).vocab_size)


def tokenizer_folder(source: ModelSource) -> Path:
    """Return the folder from which `tokenizer_of` loads."""
    with_tokenizer = (
        found.folder
        for found in sources_of(source)
        if found.adapter is None or any((found.folder / file).is_file() for file in TOKENIZERS)
    )
    return next(with_tokenizer)


def folders_of(source: ModelSource) -> list[Path]:
    """Return the folders that a model is read from, including those of the models below its adapters."""
    return [found.folder for found in sources_of(source)]


def quantized_base(source: ModelSource) -> WeightQuantization | None:
    """Return the quantization of the base weights during an adapter's training; None if none is known.

    Only the run's record states a quantization that was applied while loading. Without the run directory, only a base
    model that is stored quantized is known to be.

    Raises:
        CheckpointError: If the run's record is invalid, or the adapter's initialization changes weights that are
            quantized.
        HymbaTuneError: If the base model cannot be found; see `base_of`.
    """
    if source.adapter is None:
        return None
    below = base_of(source)
    config = load_config(below) if below.adapter is None else plain_config(below)
    try:
        dtype = DTYPES[source.dtype or str(torch.float32)]
        scheme = Scheme(source.quantized) if source.quantized else None
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"The run.json of {source.name} is invalid: {error}") from error
    base = decide_quantization(config, scheme, dtype)
    if base is not None and changes_base(adapter := read_config(source.adapter)):
        raise CheckpointError(
            f"{source.adapter}: its init_lora_weights, {adapter.init_lora_weights}, changes the weights of its base "
            f"model, and those of {source.base} are quantized.",
            expected="an adapter with another initialization, or a base model that is not quantized",
        )
    return base


def check_onto(source: ModelSource, onto: Onto) -> None:
    """Check that an adapter can be merged into weights of this kind.

    Raises:
        ConfigError: If its base model has no such weights.
    """
    base = quantized_base(source)
    if base is None and onto is Onto.dequantized:
        raise ConfigError(
            f"--onto dequantized: {source.name} is not known to be trained on quantized weights.",
            expected="a run that was trained with --quantize, or on a quantized model",
            fix="leave it out; for the adapter of a run, pass the run directory",
        )
    if base is not None and base.stored and onto is Onto.original:
        raise ConfigError(
            f"--onto original: {source.base} is stored in {base.scheme}, and has no other weights.",
            fix="leave it out",
        )


def reason_against_continuing(source: ModelSource) -> str | None:
    """Return why an adapter cannot be trained further without merging it, as a predicate; None if it can.

    Raises:
        HymbaTuneError: If the base model cannot be found; see `base_of`.
    """
    if source.adapter is None:
        return None
    config = read_config(source.adapter)
    if trains(config, HEAD) or (config.ensure_weight_tying and trains(config, EMBEDDING)):
        return "trains the whole head, and losses of preferences only read its weight"
    if saved_vocabulary(source.adapter) not in (None, vocabulary_of(base_of(source))):
        return "contains a resized embedding, which a run does not save with it again"
    return None


def folding_note(source: ModelSource, *, whole: bool = False) -> str | None:
    """Return notes for users of an adapter: that it was trained on quantized weights, or that its base has changed.

    Args:
        source: Of `resolve_model`.
        whole: Whether all bytes of a base model are compared, as `changed_base` does.

    Returns:
        A line for each note; None if there is none.

    Raises:
        HymbaTuneError: If the base model or the run's record cannot be used; see `quantized_base`.
    """
    notes: list[str] = []
    for adapter, below in pairwise(sources_of(source)):
        if (base := quantized_base(adapter)) is not None and not notes:
            notes.append(f"{adapter.name}: merged into the weights it was trained on, {base.scheme} dequantized")
        if (change := changed_base(adapter, below, folders_of(below), whole=whole)) is not None:
            notes.append(change)
    return "\n".join(notes) or None


def folded_weights(source: ModelSource, onto: Onto = Onto.dequantized, *, device: torch.device = CPU) -> Weights:
    """Return the tensors of a model with its adapters merged, each of which is computed when it is read.

    Weights and adapters on the Hub are downloaded first.

    Args:
        source: The model from `resolve_model`.
        onto: The weights into which an adapter that was trained on quantized weights is merged. Adapters below it are
            always merged into the weights that they were trained on.
        device: The device on which weights are quantized and dequantized. All tensors are returned on the CPU.

    Raises:
        CheckpointError: If the weights or an adapter cannot be used; see `check_weights` and `load_adapter`.
        HubError: If they cannot be downloaded.
    """
    weights_of(source)  # raises if the base models never end
    fetch_weights(source)
    if source.adapter is None:
        config = load_config(source)
        check_weights(source.folder, config)
        return StoredWeights(source.folder, config)
    model = base_of(source)
    below = folded_weights(model, device=device)
    base = quantized_base(source)
    config = plain_config(model)
    if base is not None and not base.stored and onto is Onto.dequantized:
        layers = stored_bytes(config, base.config).keys()
        below = RoundedWeights(below, base.config, layers, dtype=base.dtype, device=device)
    return FoldedWeights(below, config, source.adapter)


def plain_config(source: ModelSource) -> Any:
    """Return the configuration of a model after its adapters are merged, which is never quantized."""
    *adapters, weights = sources_of(source)
    config = copy.deepcopy(load_config(weights))
    for found in reversed(adapters):
        adapter = read_config(found.folder)
        config.vocab_size = vocabulary_with(adapter, config.vocab_size, found.folder)
        config.tie_word_embeddings = config.tie_word_embeddings and not unties(adapter)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config

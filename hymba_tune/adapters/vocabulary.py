"""The embedding and the head below adapters: added tokens, resized matrices, and heads that adapters untie."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hymba_tune.checkpoint import read_header
from hymba_tune.errors import CheckpointError

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
SAVED = re.compile(
    rf"base_model\.model\.({re.escape(EMBEDDING)}|{HEAD})\."
    r"(modules_to_save\.|original_module\.|base_layer\.|token_adapter\.base_layer\.)?weight"
)
"""Names under which PEFT saves whole matrices with an adapter: those that it does not train, if they were resized or
have an adapter, and copies that it trains, some under two names."""
T = TypeVar("T")


def tokens_past(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> dict[int, str]:
    """Return the tokens whose ids are past a model's vocabulary, by their ids in order.

    Args:
        tokenizer: The tokenizer.
        vocabulary: The number of rows of the model's embedding, which may be padded.
    """
    past = {number: token for token, number in tokenizer.get_vocab().items() if number >= vocabulary}
    return dict(sorted(past.items()))


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocabulary: int, name: str) -> None:
    """Check that a model has a row for every token of its tokenizer.

    Args:
        tokenizer: The tokenizer.
        vocabulary: The number of rows of the model's embedding.
        name: The name of the model, for the message.

    Raises:
        CheckpointError: If it has not; the message names the first such token.
    """
    past = tokens_past(tokenizer, vocabulary)
    if not past:
        return
    number, token = next(iter(past.items()))
    others = f", and {len(past) - 1:,} others are, too" if len(past) > 1 else ""
    raise CheckpointError(
        f"{name}: token id {number:,} ({token[:80]}) of the tokenizer is past the model's vocab_size of "
        f"{vocabulary:,}{others}.",
        expected=f"token ids below {vocabulary:,}",
        fix="train with --resize, which adds rows to the embedding and the head and saves them with the adapter; or "
        "restore the tokenizer that belongs to the model",
    )


def trained_rows(config: LoraConfig) -> list[int]:
    """Return the tokens whose rows of the embedding or the head an adapter contains."""
    rows = config.trainable_token_indices or []
    lists = rows.values() if isinstance(rows, dict) else [rows]
    return sorted({row for numbers in lists for row in numbers})


def saved_embeddings(tensors: Mapping[str, T], trained: Collection[str] = ()) -> dict[str, T]:
    """Return the embedding and the head that PEFT has saved with an adapter, as far as the adapter does not train them.

    Args:
        tensors: The adapter's tensors, or what is known of them.
        trained: The names of the tensors that the adapter trains.

    Returns:
        What ``tensors`` has, by the names in checkpoints.
    """
    matches = {name: SAVED.fullmatch(name) for name in tensors if name not in trained}
    return {
        f"{match[1]}.weight": tensors[name]
        for name, match in matches.items()
        if match is not None and match[2] != "modules_to_save."
    }


def trains(config: LoraConfig, module: str) -> bool:
    """Return whether an adapter trains the embedding or the head by factors or as a copy, and not only rows of it."""
    copied = any(module.endswith(name) for name in config.modules_to_save or [])
    return copied or bool(check_target_module_exists(config, module))


def unties(config: LoraConfig) -> bool:
    """Return whether an adapter gives a model, whose head is its embedding, a head of its own."""
    if config.ensure_weight_tying:
        return False
    if trains(config, EMBEDDING) or trains(config, HEAD):
        return True
    rows = config.trainable_token_indices
    if not isinstance(rows, dict):
        return False
    by_layer = {name.rpartition(".")[2]: numbers for name, numbers in rows.items()}
    return HEAD in by_layer and by_layer[HEAD] != by_layer.get("embed_tokens")


def saved_vocabulary(folder: Path) -> int | None:
    """Return the number of rows of the embedding or the head in an adapter's weights; None if they contain neither."""
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    saved = saved_embeddings(read_header(weights) if weights.is_file() else {})
    return max((tensor.shape[0] for tensor in saved.values() if tensor.shape), default=None)


def vocabulary_with(config: LoraConfig, vocabulary: int, folder: Path) -> int:
    """Return the size of a vocabulary with the tokens that an adapter adds to it.

    Args:
        config: The adapter's configuration.
        vocabulary: The size of the vocabulary of its base model.
        folder: The adapter's folder. Weights that are not downloaded yet are taken to have no embedding.

    Raises:
        CheckpointError: If a row between the base model's vocabulary and an added token is missing.
    """
    vocabulary = saved_vocabulary(folder) or vocabulary
    rows = trained_rows(config)
    added = [row for row in rows if row >= vocabulary]
    if min(rows, default=0) < 0 or (added and added[-1] - vocabulary >= len(added)):
        raise CheckpointError(
            f"{folder} contains rows for the tokens {rows[0]:,} to {rows[-1]:,}, but not for all above the "
            f"{vocabulary:,} tokens of its base model.",
            expected=f"a row for every added token, from {vocabulary:,}",
            fix="load it on its own base model",
        )
    return added[-1] + 1 if added else vocabulary


def widen_vocabulary(model: PreTrainedModel, vocabulary: int) -> None:
    """Add rows to a model's embedding and head, in place. Each new row is the mean of the others.

    Args:
        model: The model.
        vocabulary: The new number of rows, at least the present one.
    """
    before = model.config.vocab_size
    if vocabulary == before:
        return
    model.resize_token_embeddings(vocabulary, mean_resizing=False)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.weight[before:] = layer.weight[:before].float().mean(0).to(layer.weight.dtype)

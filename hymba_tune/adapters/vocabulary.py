"""Tokens that a tokenizer has and a model has not: their rows of the embedding and of the head."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hymba_tune.errors import CheckpointError


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


def vocabulary_with(config: LoraConfig, vocabulary: int, folder: Path) -> int:
    """Return the size of a vocabulary with the tokens that an adapter adds to it.

    Args:
        config: The adapter's configuration.
        vocabulary: The size of the vocabulary of its base model.
        folder: The adapter's folder, for the message.

    Raises:
        CheckpointError: If a row between the base model's vocabulary and an added token is missing.
    """
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

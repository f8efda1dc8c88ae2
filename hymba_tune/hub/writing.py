"""Steps that exports and quantized models share: the default folder, and reloading to compare."""

from __future__ import annotations

import gc
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hymba_tune.checkpoint import load_tokenizer, load_weights
from hymba_tune.hub.checks import check_logits, check_tokens, sample_logits
from hymba_tune.registry import ModelSource


def reload_model(
    folder: Path, tokenizer: PreTrainedTokenizerBase, original: Tensor, *, dtype: torch.dtype, device: torch.device
) -> tuple[PreTrainedModel, float]:
    """Reload a written model and compare it with the original, which should no longer be in memory.

    Args:
        folder: The folder that `write_model` wrote.
        tokenizer: The tokenizer that was written.
        original: The logits of the original model, from `sample_logits`.
        dtype: The dtype in which the original model computed.
        device: The device on which it computed.

    Returns:
        The reloaded model, and the largest difference between its logits and the original ones.

    Raises:
        CheckpointError: If the two differ.
    """
    gc.collect()
    reloaded = load_weights(ModelSource(folder.name, folder), dtype=dtype, device=device)
    check_tokens(load_tokenizer(folder), tokenizer, folder)
    return reloaded, check_logits(sample_logits(reloaded, tokenizer), original, folder)


def default_folder(source: ModelSource, *, ending: str = "") -> Path:
    """Return the default folder of an export: ``exports/`` and the name of the model, without its owner."""
    return Path("exports") / (Path(source.name).name.replace("@", "-") + ending)

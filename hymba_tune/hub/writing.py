"""A model that was written, read again and compared: what an export and a quantized model have in common."""

from __future__ import annotations

import gc
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hymba_tune.checkpoint import load_tokenizer, load_weights
from hymba_tune.hub.checks import check_logits, check_tokens, sample_logits
from hymba_tune.registry import ModelSource


def read_again(
    folder: Path, tokenizer: PreTrainedTokenizerBase, meant: Tensor, *, dtype: torch.dtype, device: torch.device
) -> tuple[PreTrainedModel, float]:
    """Read what was written, and compare. By then nobody should hold the model that was written.

    Args:
        folder: What `write_model` wrote.
        tokenizer: That was written.
        meant: `sample_logits` of the model that was written.
        dtype: What that one computed in.
        device: Where.

    Returns:
        The model, and the largest difference between its logits and those that were meant.

    Raises:
        CheckpointError: If it is another one.
    """
    gc.collect()
    again = load_weights(ModelSource(folder.name, folder), dtype=dtype, device=device)
    check_tokens(load_tokenizer(folder), tokenizer, folder)
    return again, check_logits(sample_logits(again, tokenizer), meant, folder)


def usual_folder(source: ModelSource, *, ending: str = "") -> Path:
    """Where a model is written to when nothing says so: ``exports/`` and its name, without its owner."""
    return Path("exports") / (Path(source.name).name.replace("@", "-") + ending)

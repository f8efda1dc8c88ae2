"""Folding an adapter into its base model."""

from __future__ import annotations

import torch
from peft import PeftModel, get_peft_model_state_dict
from transformers import PreTrainedModel

from hymba_tune.adapters.presets import META_TOKENS
from hymba_tune.errors import CheckpointError


def merge(model: PeftModel) -> PreTrainedModel:
    """Fold the adapter into its base model, in place.

    Every sum is taken in float32 at least, and rounded once to the base model's dtype.

    Returns:
        The base model without a trace of the adapter; it saves under the released names.

    Raises:
        CheckpointError: If the adapter holds NaN or infinity. The base model is then as it was.
    """
    for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items():
        if not tensor.isfinite().all():
            raise CheckpointError(
                f"{name} holds NaN or infinity, so the adapter cannot be merged.",
                fix="merge an earlier checkpoint, or train again at a lower learning rate",
            )
    base = model.get_base_model()
    dtype = base.dtype
    # PEFT rounds an embedding's update before it adds it; linear layers it adds in the wider dtype of the two, unless
    # asked for its safe merge, which rounds them first as well.
    _cast_meta_tokens(base, torch.promote_types(dtype, torch.float32))
    merged: PreTrainedModel = model.merge_and_unload()
    _cast_meta_tokens(merged, dtype)
    return merged


def _cast_meta_tokens(model: PreTrainedModel, dtype: torch.dtype) -> None:
    if (tokens := getattr(model.base_model, META_TOKENS)) is not None:
        tokens.to(dtype)

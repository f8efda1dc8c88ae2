"""Quantizes a model in memory."""

from __future__ import annotations

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from hymba_tune.adapters import weights_of
from hymba_tune.checkpoint import META_TOKENS, load_config
from hymba_tune.errors import CheckpointError
from hymba_tune.registry import ModelSource
from hymba_tune.schemes import fix_loaded_quantization, scheme_of, stored_quantization


def check_quantizable(source: ModelSource) -> None:
    """Check that a model is not quantized already. A run can be, because its adapter is merged into full weights.

    Raises:
        CheckpointError: If it is.
    """
    stored = None if source.adapter else stored_quantization(load_config(weights_of(source)))
    if stored is not None:
        raise CheckpointError(
            f"{source.name} is quantized already, to {scheme_of(stored)}.",
            expected="a model or a run whose weights are not quantized",
            fix="pass the model it was quantized from",
        )


def quantize_model(model: PreTrainedModel, quantization: BitsAndBytesConfig) -> PreTrainedModel:
    """Quantize a model in memory, bit for bit as transformers does while loading.

    The weights are quantized one by one into a new model. The original stays unchanged, and the two share the weights
    that are not quantized.

    Args:
        model: The model, without an adapter and not quantized.
        quantization: The configuration from `hymba_tune.schemes.quantization`.

    Returns:
        The quantized model, in evaluation mode.
    """
    dtype: torch.dtype = model.dtype
    # The names of the checkpoint: transformers saves a model under the names that it has loaded.
    weights = {name.replace(f"{META_TOKENS}.weight", META_TOKENS): held for name, held in model.state_dict().items()}
    quantized: PreTrainedModel = type(model).from_pretrained(
        None,
        config=model.config,
        state_dict=weights,
        quantization_config=quantization,
        dtype=dtype,
        device_map={"": model.device},
    )
    quantized.generation_config = model.generation_config
    fix_loaded_quantization(quantized, dtype)
    return quantized

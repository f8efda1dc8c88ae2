"""From a model in memory to the same in fewer bits."""

from __future__ import annotations

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from hymba_tune.adapters import weights_of
from hymba_tune.checkpoint import META_TOKENS, load_config
from hymba_tune.errors import CheckpointError
from hymba_tune.registry import ModelSource
from hymba_tune.schemes import scheme_of, settle, stored_quantization


def check_quantizable(source: ModelSource) -> None:
    """See that a model is not quantized already; of a run it does not matter, its adapter is folded into full weights.

    Raises:
        CheckpointError: If it is.
    """
    stored = None if source.adapter else stored_quantization(load_config(weights_of(source)))
    if stored is not None:
        raise CheckpointError(
            f"{source.name} is quantized already, to {scheme_of(stored)}.",
            expected="a model or a run whose weights have their full format",
            fix="name the model it was made from",
        )


def quantize_model(model: PreTrainedModel, quantization: BitsAndBytesConfig) -> PreTrainedModel:
    """Quantize a model that is in memory, as transformers quantizes one that it loads, bit for bit.

    The weights are quantized one after the other, beside the model, which stays as it was: both together take its size
    and what the quantized weights take. What is not quantized, they share.

    Args:
        model: Without an adapter, not quantized.
        quantization: Of `hymba_tune.schemes.quantization`.

    Returns:
        The quantized model, in evaluation mode.
    """
    dtype: torch.dtype = model.dtype
    # Under the names of files: transformers writes a model under those it has read.
    weights = {name.replace(f"{META_TOKENS}.weight", META_TOKENS): held for name, held in model.state_dict().items()}
    made: PreTrainedModel = type(model).from_pretrained(
        None,
        config=model.config,
        state_dict=weights,
        quantization_config=quantization,
        dtype=dtype,
        device_map={"": model.device},
    )
    made.generation_config = model.generation_config
    settle(made, dtype)
    return made

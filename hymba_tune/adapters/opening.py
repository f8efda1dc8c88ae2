"""Models by any name, the adapters that runs have trained folded in."""

from __future__ import annotations

import torch
from transformers import BitsAndBytesConfig, GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from hymba_tune.adapters.folding import folded_weights, plain_config, weights_of
from hymba_tune.adapters.weights import finite_tensor
from hymba_tune.checkpoint import load_weights
from hymba_tune.config import Onto
from hymba_tune.model import HymbaForCausalLM
from hymba_tune.registry import ModelSource


def open_model(
    source: ModelSource,
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantization: BitsAndBytesConfig | None = None,
    onto: Onto = Onto.dequantized,
) -> PreTrainedModel:
    """Load a model; where it is an adapter, its base model with the adapter folded in.

    Args:
        source: Of `resolve_model`.
        dtype: What it computes in.
        device: Where to.
        quantization: As `load_weights` takes it, for a model without an adapter.
        onto: As `folded_weights` takes it.

    Raises:
        CheckpointError: If weights or adapter cannot be used; see `load_weights` and `load_adapter`.
        HubError: If they cannot be downloaded.
    """
    if source.adapter is None:
        return load_weights(source, dtype=dtype, device=device, quantization=quantization)
    weights, config = folded_weights(source, onto, device=device), plain_config(source)
    model: PreTrainedModel = HymbaForCausalLM.from_pretrained(
        None,
        config=config,
        state_dict={name: finite_tensor(weights, name, dtype) for name in weights},
        dtype=dtype,
        device_map={"": device},
    )
    below = weights_of(source).folder
    if (below / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(below)
    return model

"""Loads models of any kind, with their adapters merged."""

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
    """Load a model; for an adapter, its base model with the adapter merged.

    Args:
        source: The model from `resolve_model`.
        dtype: The dtype of the computation.
        device: The device of the model.
        quantization: The quantization to apply, as for `load_weights`. It is ignored for adapters.
        onto: The weights into which an adapter is merged, as for `folded_weights`.

    Raises:
        CheckpointError: If the weights or the adapter cannot be used; see `load_weights` and `load_adapter`.
        HubError: If they cannot be downloaded.
    """
    if source.adapter is None:
        return load_weights(source, dtype=dtype, device=device, quantization=quantization)
    weights = folded_weights(source, onto, device=device)
    config = plain_config(source)
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

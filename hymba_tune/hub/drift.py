"""Compares a merged model with the trained one: the quantized base model with its unmerged adapter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hymba_tune.adapters import Weights, base_of, folded_weights, load_adapter, plain_config
from hymba_tune.checkpoint import load_weights
from hymba_tune.data import open_source
from hymba_tune.errors import CheckpointError
from hymba_tune.evaluate.texts import ScoringTexts
from hymba_tune.model import HymbaForCausalLM
from hymba_tune.registry import ModelSource, fetch_weights
from hymba_tune.schemes import WeightQuantization, fix_loaded_quantization

TEXTS, TOKENS = 8, 64
"""The number of packaged texts on which logits are compared, and the maximum tokens of each."""


@dataclass(frozen=True)
class MergeDrift:
    """The difference between the logits of a merged model and of the trained one.

    Attributes:
        divergence: The mean KL(trained || merged), in nats per token.
        largest: The largest difference between two logits.
    """

    divergence: float
    largest: float


def sample_texts(tokenizer: PreTrainedTokenizerBase) -> list[Tensor]:
    """Return a few packaged conversations, each as ``(1, L)`` ids."""
    held_out = open_source("demo").held_out
    assert held_out is not None
    rows = ScoringTexts([held_out], tokenizer, TOKENS).rows()
    return [torch.tensor([row.encoded.input_ids]) for row in islice(rows, TEXTS)]


def trained_model(source: ModelSource, base: WeightQuantization, device: torch.device) -> PreTrainedModel:
    """Load the model of a run as it was in training, except for dropout.

    Raises:
        CheckpointError: If the weights or the adapter cannot be used; see `load_weights` and `load_adapter`.
    """
    assert source.adapter is not None
    fetch_weights(source)
    below = base_of(source)
    if base.stored:
        model = load_weights(below, dtype=base.dtype, device=device)
    else:
        weights = folded_weights(below)
        model = HymbaForCausalLM.from_pretrained(
            None,
            config=plain_config(below),
            state_dict={name: _LazyTensor(weights, name) for name in weights},
            quantization_config=base.config,
            dtype=base.dtype,
            device_map={"": device},
        )
        fix_loaded_quantization(model, base.dtype)
    adapted = load_adapter(model, source.adapter).train()  # in evaluation mode, int8 also rounds activations
    for module in adapted.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    return adapted


@dataclass(frozen=True)
class _LazyTensor:
    """A tensor that transformers reads only when it quantizes it, like a tensor in a file."""

    weights: Weights
    name: str

    def __getitem__(self, _: Any) -> Tensor:
        return self.weights[self.name]


@torch.no_grad()
def logits_of(model: PreTrainedModel, texts: Sequence[Tensor]) -> list[Tensor]:
    """Return the logits of each text, ``(L, V)`` float32 on the CPU."""
    return [model(input_ids=ids.to(model.device), use_cache=False).logits[0].float().cpu() for ids in texts]


def drift(merged: Sequence[Tensor], trained: Sequence[Tensor]) -> MergeDrift:
    """Compare the logits that `logits_of` returns for two models on the same texts.

    Raises:
        CheckpointError: If a logit is NaN or infinite.
    """
    pairs = list(zip(merged, trained, strict=True))
    sums = [
        float(kl_div(merged_logits.log_softmax(-1), trained_logits.log_softmax(-1), log_target=True, reduction="sum"))
        for merged_logits, trained_logits in pairs
    ]
    largest = max(float((merged_logits - trained_logits).abs().max()) for merged_logits, trained_logits in pairs)
    if not all(map(math.isfinite, [*sums, largest])):
        raise CheckpointError(
            "The logits of the merged model are NaN or infinite.", fix="train again at a lower learning rate"
        )
    return MergeDrift(sum(sums) / sum(map(len, trained)), largest)

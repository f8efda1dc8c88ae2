"""How far a merged model is from the one that was trained: the quantized base with its adapter beside it."""

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
from hymba_tune.schemes import WeightQuantization, settle

TEXTS, TOKENS = 8, 64
"""Texts of the packaged data that logits are compared on, and the tokens that each may have."""


@dataclass(frozen=True)
class MergeDrift:
    """What a merged model makes of texts, compared with the trained model.

    Attributes:
        divergence: Mean KL(trained || merged), nats a token.
        largest: The largest difference between two logits.
    """

    divergence: float
    largest: float


def sample_texts(tokenizer: PreTrainedTokenizerBase) -> list[Tensor]:
    """A few packaged conversations, each ``(1, L)`` ids."""
    held_out = open_source("demo").held_out
    assert held_out is not None
    rows = ScoringTexts([held_out], tokenizer, TOKENS).rows()
    return [torch.tensor([row.encoded.input_ids]) for row in islice(rows, TEXTS)]


def trained_model(source: ModelSource, base: WeightQuantization, device: torch.device) -> PreTrainedModel:
    """A run's model as it was while it was trained, but for dropout.

    Raises:
        CheckpointError: As `load_weights` and `load_adapter`.
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
            config=plain_config(source),
            state_dict={name: _Unread(weights, name) for name in weights},
            quantization_config=base.config,
            dtype=base.dtype,
            device_map={"": device},
        )
        settle(model, base.dtype)
    adapted = load_adapter(model, source.adapter).train()  # evaluated, int8 rounds activations as well
    for module in adapted.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    return adapted


@dataclass(frozen=True)
class _Unread:
    """A tensor that transformers reads when its turn comes, as it does with those in files, and quantizes at once."""

    weights: Weights
    name: str

    def __getitem__(self, _: Any) -> Tensor:
        return self.weights[self.name]


@torch.no_grad()
def logits_of(model: PreTrainedModel, texts: Sequence[Tensor]) -> list[Tensor]:
    """Logits of each text, ``(L, V)`` float32, on the CPU."""
    return [model(input_ids=ids.to(model.device), use_cache=False).logits[0].float().cpu() for ids in texts]


def drift(merged: Sequence[Tensor], trained: Sequence[Tensor]) -> MergeDrift:
    """Compare the logits of texts; both as `logits_of` gives them.

    Raises:
        CheckpointError: If a logit is no number.
    """
    pairs = list(zip(merged, trained, strict=True))
    sums = [
        float(kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="sum"))
        for ours, theirs in pairs
    ]
    largest = max(float((ours - theirs).abs().max()) for ours, theirs in pairs)
    if not all(map(math.isfinite, [*sums, largest])):
        raise CheckpointError("The merged model's logits are no numbers.", fix="train again at a lower learning rate")
    return MergeDrift(sum(sums) / sum(map(len, trained)), largest)

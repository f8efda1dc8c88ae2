"""Models that are to be asked: found first, so that all else can be checked before the weights load."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hymba_tune.adapters import folding_note, open_model, tokenizer_of, weights_of
from hymba_tune.checkpoint import choose_device, choose_dtype, choose_kernels, load_config
from hymba_tune.config import GenerationOptions, as_mapping
from hymba_tune.data import with_chat_template
from hymba_tune.registry import ModelSource, resolve_model


@dataclass(frozen=True)
class LoadableModel:
    """A model without its weights; those of a Hub model are not downloaded.

    Attributes:
        source: Where it is.
        tokenizer: With a chat template.
        config: Of the model below all adapters.
        dtype: The number format it will have.
        device: Where it will be.
    """

    source: ModelSource
    tokenizer: PreTrainedTokenizerBase
    config: Any
    dtype: torch.dtype
    device: torch.device

    @property
    def note(self) -> str | None:
        """What is worth knowing of how its adapters are folded in."""
        return folding_note(self.source)

    def load(self) -> PreTrainedModel:
        """Its weights, adapters folded in, in evaluation mode; errors are those of `open_model`."""
        return open_model(self.source, dtype=self.dtype, device=self.device).eval()


def find_model(name: str, options: GenerationOptions, chat_template: str | None = None) -> LoadableModel:
    """Find a model, and choose how this process computes it.

    Args:
        name: Whatever --model takes.
        options: The device, the number format and the kernels.
        chat_template: As `with_chat_template` takes it.

    Raises:
        HymbaTuneError: If it cannot be found, or not be computed in this way.
    """
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    source = resolve_model(name)
    config = load_config(weights_of(source))
    choose_kernels(as_mapping(options.kernels), config, device, dtype)
    tokenizer = with_chat_template(tokenizer_of(source), chat_template)
    return LoadableModel(source, tokenizer, config, dtype, device)

"""Models for inference, resolved before their weights load, so that everything else can be checked first."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hymba_tune.adapters import folding_note, open_model, tokenizer_of, weights_of
from hymba_tune.checkpoint import check_cuda_graphs, choose_device, choose_dtype, choose_kernels, load_config
from hymba_tune.config import GenerationOptions, as_mapping
from hymba_tune.data import with_chat_template
from hymba_tune.registry import ModelSource, resolve_model

KERNEL_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""oneDNN's own limit and PyTorch's, read when the first matrix is multiplied."""
CACHED_KERNELS = "64"
"""Number of kernels to keep: enough for the layers of a model at a few batch sizes."""


@dataclass(frozen=True)
class LoadableModel:
    """A model whose weights are not loaded yet; those of a Hub model are not downloaded either.

    Attributes:
        source: Where the model is.
        tokenizer: The model's tokenizer, with a chat template.
        config: The configuration of the base model under all adapters.
        dtype: The dtype that the weights will have.
        device: The device that the weights will be on.
    """

    source: ModelSource
    tokenizer: PreTrainedTokenizerBase
    config: Any
    dtype: torch.dtype
    device: torch.device

    @property
    def note(self) -> str | None:
        """A note for the user on how the adapters are merged, if there is one."""
        return folding_note(self.source)

    def load(self) -> PreTrainedModel:
        """Load the weights, with adapters merged, in evaluation mode; raises what `open_model` raises."""
        # In bfloat16 on a CPU, a kernel is compiled for each number of tokens, and 1,024 of them are kept: 4 MB more
        # for every batch of prompts of a new length, up to a gigabyte.
        for variable in KERNEL_CACHES:
            os.environ.setdefault(variable, CACHED_KERNELS)
        return open_model(self.source, dtype=self.dtype, device=self.device).eval()


def find_model(name: str, options: GenerationOptions, chat_template: str | None = None) -> LoadableModel:
    """Resolve a model, and choose the device, the dtype and the kernels.

    Args:
        name: A model, as ``--model`` accepts it.
        options: The user's choice of device, dtype and kernels.
        chat_template: A chat template, as `with_chat_template` accepts it.

    Raises:
        HymbaTuneError: If the model cannot be found, or the device, dtype or kernels cannot be used.
    """
    device = choose_device(options.device)
    if options.cuda_graphs:
        check_cuda_graphs(device)
    dtype = choose_dtype(options.dtype, device)
    source = resolve_model(name)
    config = load_config(weights_of(source))
    choose_kernels(as_mapping(options.kernels), config, device, dtype)
    tokenizer = with_chat_template(tokenizer_of(source), chat_template)
    return LoadableModel(source, tokenizer, config, dtype, device)

"""What a run works with, once its settings are checked and its data is read."""

from __future__ import annotations

from dataclasses import dataclass

import datasets
import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from hymba_tune.config import Method, SFTConfig
from hymba_tune.data import Conversation, DataReport
from hymba_tune.model.backends import Choice
from hymba_tune.registry import ModelSource
from hymba_tune.train.run import Run


@dataclass(frozen=True)
class Setup:
    """What a run works with, checked before any weights are loaded."""

    run: Run
    config: SFTConfig
    source: ModelSource
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    dtype: torch.dtype
    model_config: PretrainedConfig
    kernels: dict[str, Choice]

    @property
    def weights_dtype(self) -> torch.dtype:
        """Float32 where all weights are trained, and ``dtype`` only computed in: it would round small steps away."""
        return torch.float32 if self.config.method is Method.full else self.dtype


@dataclass(frozen=True)
class Data:
    """Encoded rows, and a few prompts with their answers."""

    train: datasets.Dataset
    held_out: datasets.Dataset | None
    report: DataReport
    prompts: list[tuple[Conversation, str]]
    length_warning: str | None

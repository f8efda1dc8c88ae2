"""Noticing adapters that training does not reach."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor
from transformers import PreTrainedModel

from hymba_tune.adapters.initialization import ADAPTER


class AdapterWatch:
    """Tells which adapted modules an optimizer step left as they were.

    A model that reads a module's weight instead of calling the module trains as if nothing were wrong, and its adapter
    there never changes.

    Args:
        model: Before the step. Only a norm of each module is kept.
    """

    def __init__(self, model: PeftModel) -> None:
        self._model = model
        self._before = _norms(model)

    def unmoved(self) -> list[str]:
        """Names of the modules that did not change, as the base model calls them. Ask after a step with lr > 0."""
        after = _norms(self._model)
        return [name for name, norm in self._before.items() if after[name] == norm]


def _norms(model: PeftModel) -> dict[str, float]:
    # In float64 a step that leaves a norm as it was has left the tensor as it was.
    return {
        name: torch.linalg.vector_norm(factor.detach(), dtype=torch.float64).item()
        for name, factor in _first_to_move(model.get_base_model())
    }


def _first_to_move(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """What a first step changes: the factors that start at zero. The others have no gradient yet, but may decay."""
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            yield name, module.modules_to_save[ADAPTER].weight
        elif isinstance(module, LoraLayer):
            linear = ADAPTER in module.lora_B
            yield name, module.lora_B[ADAPTER].weight if linear else module.lora_embedding_A[ADAPTER]

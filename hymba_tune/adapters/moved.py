"""Detects adapted modules that training does not change."""

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
    """Finds the adapted modules that an optimizer step does not change.

    If a model reads the weight of a module instead of calling the module, training raises no error, but the adapter of
    that module never changes.

    Args:
        model: The model before the step. Only one norm per module is stored.
    """

    def __init__(self, model: PeftModel) -> None:
        self._model = model
        self._before = _norms(model)

    def unmoved(self) -> list[str]:
        """Return the names of the modules that a step with lr > 0 did not change, as in the base model."""
        after = _norms(self._model)
        return [name for name, norm in self._before.items() if after[name] == norm]


def _norms(model: PeftModel) -> dict[str, float]:
    # In float64, an unchanged norm means an unchanged tensor.
    return {
        name: torch.linalg.vector_norm(factor.detach(), dtype=torch.float64).item()
        for name, factor in _first_to_move(model.get_base_model())
    }


def _first_to_move(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield what a first step changes: factors that start at zero. The others have no gradient yet, but may decay."""
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            for part, parameter in module.modules_to_save[ADAPTER].named_parameters():
                yield f"{name}.{part}".removesuffix(".weight"), parameter
        elif isinstance(module, LoraLayer):
            linear = ADAPTER in module.lora_B
            yield name, module.lora_B[ADAPTER].weight if linear else module.lora_embedding_A[ADAPTER]

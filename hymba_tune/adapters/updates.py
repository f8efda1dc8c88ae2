"""Measures how much training has changed each part of a model.

For a module with weight W and update ΔW, the measure is ||ΔW|| / ||W|| (Frobenius). The product of a LoRA update
ΔW = s·B·A is never computed: with b the row i of B, ||s·b·A||² = s²·b·(A·Aᵀ)·bᵀ, and A·Aᵀ is only rank × rank. The new
weight of DoRA is g∘(W + s·B·A) with a factor g per row, which also needs ⟨W, B·A⟩ = rowsum(B ∘ (W·Aᵀ)).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.integrations import dequantize_module_weight
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from hymba_tune.adapters.initialization import ADAPTER
from hymba_tune.adapters.presets import META_TOKENS

ATTENTION, SSM, BOTH, MLP, META, REST = "attention", "SSM", "attention + SSM", "MLP", "meta tokens", "embedding"
IN_PROJ_OUTPUTS = (("q", ATTENTION), ("k", ATTENTION), ("v", ATTENTION), ("x", SSM), ("gate", SSM))
"""The outputs of the rows of `in_proj`, in their order (`HymbaMixer.widths`), and their groups."""
GROUPS = {
    "x_proj.0": SSM,
    "dt_proj.0": SSM,
    "conv1d": SSM,
    "A_log.0": SSM,
    "D.0": SSM,
    "out_proj": BOTH,
    "gate_proj": MLP,
    "up_proj": MLP,
    "down_proj": MLP,
    META_TOKENS: META,
    "embed_tokens": REST,
}
"""The group of each kind of module."""


@dataclass(frozen=True)
class Update:
    """The update of one part of a model.

    Attributes:
        group: The group of the part: attention, SSM, attention + SSM (fed by both), MLP, meta tokens, embedding.
        part: The name of the module, or of some of its rows.
        layer: The index of the layer, from 0; None outside the layers.
        size: The relative size ||ΔW|| / ||W||; None if it is NaN or infinite.
    """

    group: str
    part: str
    layer: int | None
    size: float | None


@torch.no_grad()
def adapter_updates(model: PeftModel) -> list[Update]:
    """Return the update of each module that an adapter changes."""
    base = model.get_base_model()
    updates: list[Update] = []
    for name, module in base.named_modules():
        if isinstance(module, LoraLayer) and ADAPTER in module.scaling:
            updates += _split(name, *_rows_of_adapter(module), base)
        elif isinstance(module, ModulesToSaveWrapper):
            for part, new in module.modules_to_save[ADAPTER].named_parameters():
                old, place = module.original_module.get_parameter(part), f"{name}.{part}".removesuffix(".weight")
                if _kind(place) in {*GROUPS, "in_proj"}:
                    updates += _split(place, _squares(new.float() - old.float()), _squares(old), base)
    return updates


@torch.no_grad()
def full_updates(model: PreTrainedModel, start: Path) -> list[Update]:
    """Return the update of each module after full training.

    Args:
        model: The trained model.
        start: The folder of the safetensors files that training started from. They are read tensor by tensor.
    """
    parameters = {
        name.replace(f"{META_TOKENS}.weight", META_TOKENS): tensor for name, tensor in model.named_parameters()
    }
    updates: list[Update] = []
    for file in sorted(start.glob("*.safetensors")):
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 (not a dict)
                module = name.removesuffix(".weight")
                if name in parameters and _kind(module) in {*GROUPS, "in_proj"}:
                    old, new = stored.get_tensor(name), parameters[name].detach().cpu()
                    new = new[: len(old)]  # without the rows of added tokens
                    updates += _split(module, _squares(new.float() - old.float()), _squares(old), model)
    return updates


def _rows_of_adapter(module: LoraLayer) -> tuple[Tensor, Tensor]:
    """Return the squared norm of each row of the update, and of the weight."""
    base, scale = module.get_base_layer(), module.scaling[ADAPTER]
    if ADAPTER in module.lora_embedding_A:  # B·A is the update of the transposed weight, and DoRA scales its rows
        down, up, weight = module.lora_embedding_A[ADAPTER], module.lora_embedding_B[ADAPTER], base.weight.T
    else:
        down, up = module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight
        weight = dequantize_module_weight(base)
    down, up = down.float(), up.float()

    added = scale**2 * ((up @ (down @ down.T)) * up).sum(1).double()
    old = _squares(weight)
    if ADAPTER not in module.lora_variant:
        return added, old

    crossed = scale * (up * (weight.float() @ down.T)).sum(1).double()
    magnitude = module.lora_magnitude_vector[ADAPTER].weight.flatten().double()
    factor = magnitude / (old + 2 * crossed + added).sqrt()
    changed = (factor - 1) ** 2 * old + 2 * factor * (factor - 1) * crossed + factor**2 * added
    return changed.clamp_min(0), old


def _squares(weight: Tensor) -> Tensor:
    """Return the squared norm of each row, in float64; a vector counts as one row."""
    flat = weight.detach().reshape(len(weight) if weight.ndim > 1 else 1, -1)
    norms: Tensor = torch.linalg.vector_norm(flat, dim=1, dtype=torch.float32)
    return norms.double().square()


def _split(name: str, changed: Tensor, old: Tensor, model: PreTrainedModel) -> Iterator[Update]:
    """Yield the update of one module; for `in_proj`, one update per output in `IN_PROJ_OUTPUTS`."""
    kind = _kind(name)
    parts = name.split(".")
    layer = int(parts[parts.index("layers") + 1]) if "layers" in parts else None
    if kind != "in_proj":
        yield Update(GROUPS.get(kind, REST), kind.removesuffix(".0"), layer, _relative([changed], [old]))
        return
    widths: Sequence[int] = model.base_model.layers[layer].mamba.widths
    for (part, group), new_rows, old_rows in zip(
        IN_PROJ_OUTPUTS, changed.split(widths), old.split(widths), strict=True
    ):
        if len(old_rows):
            yield Update(group, part, layer, _relative([new_rows], [old_rows]))


def _kind(name: str) -> str:
    """Return `x_proj.0` for `model.layers.3.mamba.x_proj.0`."""
    parts = name.split(".")
    return ".".join(parts[-2:]) if parts[-1] == "0" else parts[-1]


def _relative(changed: list[Tensor], old: list[Tensor]) -> float | None:
    size = math.sqrt(sum(rows.sum().item() for rows in changed) / sum(rows.sum().item() for rows in old))
    return size if math.isfinite(size) else None

"""The tensors of a model, one at a time: as stored in files, rounded by quantization, or with an adapter merged.

Each class is a mapping from released names to tensors that reads from the one below it, so that only one tensor is in
memory at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Int8Params, Params4bit
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper
from peft.utils.integrations import dequantize_bnb_weight
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hymba_tune.adapters.attach import embeddings_of, load_adapter
from hymba_tune.adapters.initialization import ADAPTER, change_base
from hymba_tune.adapters.settings import MERGEABLE
from hymba_tune.adapters.vocabulary import EMBEDDING, HEAD, unties
from hymba_tune.checkpoint import META_TOKENS, read_header, weight_files
from hymba_tune.errors import CheckpointError
from hymba_tune.schemes import quantized, stored_quantization

Weights = Mapping[str, Tensor]
"""The tensors of a model by their released names, each of which is computed when it is read."""
HEAD_WEIGHT = f"{HEAD}.weight"


class StoredWeights(Weights):
    """The tensors in the files of a model; quantized weights are dequantized.

    Args:
        folder: The folder of the model, whose files `check_weights` has accepted.
        model_config: The configuration of the model.
    """

    def __init__(self, folder: Path, model_config: Any) -> None:
        self._files = {name: file for file in weight_files(folder) for name in read_header(file)}
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_config)
        tied = {"lm_head.weight"} if model_config.tie_word_embeddings else set()
        self._names = [released_name(name) for name in model.state_dict() if name not in tied]
        self._quantization = stored_quantization(model_config)
        self._quantized = set(quantized(model, self._quantization)) if self._quantization else set()

    def __getitem__(self, name: str) -> Tensor:
        layer = name.removesuffix(".weight")
        if layer not in self._quantized:
            return self._read(name)
        # bitsandbytes prefixes the tensors of a 4-bit weight with the name of the weight, and those of int8 with the
        # name of the layer.
        parts = {part: self._read(part) for part in self._files if part.startswith(f"{name}.")}
        if not parts:
            weight, scales = self._read(name), self._read(f"{layer}.SCB")
            return _dequantized(Int8Params(weight, requires_grad=False, SCB=scales))
        return _dequantized(Params4bit.from_prequantized(self._read(name), parts, device="cpu"))

    def _read(self, name: str) -> Tensor:
        with safe_open(self._files[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class RoundedWeights(Weights):
    """Weights that are quantized and dequantized again, so that they are rounded as in training.

    Args:
        full: The full weights.
        quantization: The quantization.
        layers: The names of the layers that are quantized.
        dtype: The dtype of the weights before quantization, and of the computation.
        device: The device on which they are quantized.
    """

    def __init__(
        self,
        full: Weights,
        quantization: BitsAndBytesConfig,
        layers: Collection[str],
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._full = full
        self._quantization = quantization
        self._rounded = {f"{layer}.weight" for layer in layers}
        self._dtype = dtype
        self._device = device

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._rounded:
            return self._full[name]
        weight = self._full[name].to(self._dtype)
        config = self._quantization
        if config.load_in_8bit:
            return _dequantized(Int8Params(weight, requires_grad=False).to(self._device)).to(self._dtype)
        stored = Params4bit(
            weight,
            requires_grad=False,
            compress_statistics=config.bnb_4bit_use_double_quant,
            quant_type=config.bnb_4bit_quant_type,
        )
        return _dequantized(stored.to(self._device))

    def __iter__(self) -> Iterator[str]:
        return iter(self._full)

    def __len__(self) -> int:
        return len(self._full)


class FoldedWeights(Weights):
    """Weights with an adapter merged by PEFT; sums are computed at least in float32.

    Args:
        base: The weights that the adapter changes.
        model_config: The configuration of their model, without a quantization and without what the adapter changes.
        adapter: The folder of the adapter.

    Raises:
        CheckpointError: If the adapter does not fit the model, contains NaN or infinity, or changes a parameter that
            cannot be merged.
    """

    def __init__(self, base: Weights, model_config: Any, adapter: Path) -> None:
        self._base = base
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_config, dtype=torch.float32)
        adapted = load_adapter(model, adapter)
        _check_finite(adapted)
        self._config = adapted.peft_config[ADAPTER]
        self._saved = embeddings_of(adapter, adapted)
        self._changed = {released_name(f"{place.path}.{place.part}"): place for place in _changes(adapted, adapter)}
        self._names = list(base)
        self._unties = model_config.tie_word_embeddings and unties(self._config)
        if self._unties:
            self._names.append(HEAD_WEIGHT)
        elif model_config.tie_word_embeddings and self._config.ensure_weight_tying:
            self._changed.pop(HEAD_WEIGHT, None)
        if unknown := sorted(self._changed.keys() - set(self._names)):
            raise _not_mergeable(adapter, unknown[0])

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._changed:
            return self._below(name)
        place = self._changed[name]
        if isinstance(place.module, ModulesToSaveWrapper):
            trained: Tensor = place.module.modules_to_save[ADAPTER].get_parameter(place.part).detach()
            return trained
        if isinstance(place.module, TrainableTokensWrapper):
            return _with_rows(self._below(name), place.module.token_adapter)

        layer = copy.deepcopy(place.module)  # the copy takes the base weights, which must not stay in memory
        plain = layer.get_base_layer()
        for part, parameter in list(plain.named_parameters()):
            if parameter.is_meta:
                weight = self._below(released_name(f"{place.path}.{part}")).clone()
                setattr(plain, part, nn.Parameter(weight, requires_grad=False))
        change_base(layer, self._config)

        for parameter in plain.parameters():
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        try:
            layer.merge()
        except (RuntimeError, NotImplementedError) as error:  # PEFT cannot merge some kinds of adapters
            raise CheckpointError(f"{name} cannot be merged: {error}", expected=MERGEABLE) from error
        merged: Tensor = getattr(plain, place.part).detach()
        return merged

    def _below(self, name: str) -> Tensor:
        """Return a tensor as the adapter found it."""
        if name in self._saved:
            return self._saved[name]
        if name == HEAD_WEIGHT and self._unties:
            return self._below(f"{EMBEDDING}.weight")
        return self._base[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def finite_tensor(weights: Weights, name: str, dtype: torch.dtype) -> Tensor:
    """Return one tensor of a merged model in the dtype in which it will be used.

    Finite factors are not sufficient: a scale such as ``lora_alpha`` or the base weights may be NaN or too large.

    Raises:
        CheckpointError: If the tensor contains NaN or infinity.
    """
    full = weights[name]
    tensor = full.to(dtype)
    if tensor.isfinite().all():
        return tensor
    if full.isfinite().all():
        raise CheckpointError(
            f"{name} of the merged model has values outside the range of {str(dtype).removeprefix('torch.')}.",
            expected=f"values of at most {torch.finfo(dtype).max:.3g}",
            fix="--dtype bfloat16 or --dtype float32",
        )
    raise CheckpointError(
        f"{name} of the merged model contains NaN or infinity.",
        expected="finite weights",
        fix="check lora_alpha and alpha_pattern in adapter_config.json, and the weights of the base model",
    )


def released_name(name: str) -> str:
    """Return the name of a parameter in checkpoints, where the meta tokens are a parameter without a module."""
    return name.replace(f"{META_TOKENS}.weight", META_TOKENS)


@dataclass(frozen=True)
class _Place:
    """A parameter that an adapter changes."""

    path: str
    module: Any
    part: str


def _changes(adapted: PeftModel, adapter: Path) -> list[_Place]:
    places: list[_Place] = []
    known: set[Tensor] = set()
    for path, module in adapted.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            if isinstance(module.get_base_layer(), TrainableTokensWrapper):
                raise CheckpointError(
                    f"{adapter} adapts {path} and trains rows of it, which cannot be merged.",
                    expected="one of target_modules and trainable_token_indices for a module, and for those tied to it",
                )
            places += [_Place(path, module, part) for part, _ in module.get_base_layer().named_parameters()]
        elif isinstance(module, ModulesToSaveWrapper):
            places += [_Place(path, module, part) for part, _ in module.modules_to_save[ADAPTER].named_parameters()]
        elif isinstance(module, TrainableTokensWrapper):
            if module.token_adapter.tied_adapter is None:
                places.append(_Place(path, module, "weight"))
        else:
            continue
        known |= set(module.parameters())
    for name, parameter in adapted.get_base_model().named_parameters():
        if not parameter.is_meta and parameter not in known:
            raise _not_mergeable(adapter, name)
    return places


def _with_rows(weight: Tensor, trained: TrainableTokensLayer) -> Tensor:
    """Return the weight of an embedding or a head with the rows that an adapter has trained or added."""
    rows = trained.trainable_tokens_delta[ADAPTER].detach()
    weight = weight.to(torch.promote_types(weight.dtype, rows.dtype))
    added = weight.new_empty(trained.get_base_layer().weight.shape[0] - len(weight), weight.shape[1])
    numbers = torch.tensor(trained.token_indices[ADAPTER])
    return torch.cat([weight, added]).index_copy(0, numbers, rows.to(weight))


def _not_mergeable(adapter: Path, name: str) -> CheckpointError:
    return CheckpointError(
        f"{adapter} changes {name} in a way that cannot be merged.",
        expected=MERGEABLE,
    )


def _check_finite(adapted: PeftModel) -> None:
    for name, tensor in get_peft_model_state_dict(adapted, save_embedding_layers=False).items():
        if not tensor.isfinite().all():
            raise CheckpointError(
                f"{name} contains NaN or infinity, so the adapter cannot be merged.",
                fix="merge an earlier checkpoint, or train again at a lower learning rate",
            )


def _dequantized(weight: nn.Parameter) -> Tensor:
    tensor: Tensor = dequantize_bnb_weight(weight, state=weight).cpu()
    return tensor

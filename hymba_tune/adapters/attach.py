"""Putting an adapter on a model: a new one, or one that was saved."""

from __future__ import annotations

import contextlib
import functools
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftModelForCausalLM,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, ModulesToSaveWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from hymba_tune.adapters.initialization import ADAPTER, check_initialization
from hymba_tune.adapters.presets import rows_outside
from hymba_tune.errors import CheckpointError, ConfigError


def add_adapter(model: PreTrainedModel, config: LoraConfig, targets: Sequence[str]) -> PeftModel:
    """Put a new adapter on a model, which is changed in place; its logits stay what they were.

    What is trained is float32 whatever the model is stored in.

    Args:
        model: A Hymba model.
        config: Of `lora_config`.
        targets: What `lora_config` was given.

    Raises:
        ConfigError: If the preset takes some rows only and the method is DoRA.
    """
    with _quiet_peft():
        adapted = get_peft_model(model, config)
    _widen_meta_tokens(adapted)
    for module in adapted.modules():
        # PEFT takes the magnitudes in the model's dtype and widens them afterwards: rounded to bfloat16 they are not
        # the norms of the weights, and the new adapter would not be its base.
        if isinstance(module, LoraLayer) and ADAPTER in module.lora_variant:
            module.lora_variant[ADAPTER].init(module, ADAPTER)
    _save_without_asking(adapted)
    restrict_rows(adapted, targets)
    return adapted


def restrict_rows(model: PeftModel, targets: Sequence[str]) -> None:
    """Keep the rows of `in_proj` outside of an `attention` or `ssm` preset as they are in all training from now on.

    An adapter's file does not say this of itself: call it again on one that was loaded to go on training it.

    Args:
        model: With its adapter on.
        targets: As `lora_config` takes them; nothing happens unless they are one of the two presets.

    Raises:
        ConfigError: If the adapter is DoRA, whose magnitudes change every row.
    """
    for layer in model.get_base_model().base_model.layers:
        rows = rows_outside(targets, layer.mamba.widths)
        if rows is None:
            return
        if model.peft_config[ADAPTER].use_dora:
            raise ConfigError(
                f"targets: {targets[0]} adapts only some rows of in_proj, and DoRA's magnitudes change every row.",
                fix="method lora, or targets attention-ssm",
            )
        # A row of B without a gradient stays zero: its moments and its weight decay are zero too.
        layer.mamba.in_proj.lora_B[ADAPTER].weight.register_hook(_without(rows))


def load_adapter(model: PreTrainedModel, folder: Path, *, trainable: bool = False) -> PeftModel:
    """Put a saved adapter on a model, which is changed in place.

    Args:
        model: The base model; one on the meta device stays there, and only the adapter is in memory.
        folder: With `adapter_config.json` and `adapter_model.safetensors`.
        trainable: To go on training it; see also `restrict_rows`.

    Raises:
        CheckpointError: If a file is missing or broken, or the adapter does not fit the model tensor by tensor.
    """
    config, tensors = read_config(folder), _read_tensors(folder)
    config.inference_mode = not trainable
    without_memory = model.device.type == "meta"
    try:
        with _quiet_peft():
            adapted = PeftModelForCausalLM(model, config, ADAPTER, low_cpu_mem_usage=without_memory)
    except (ValueError, TypeError) as error:  # PEFT found none of the modules, or a rank or alpha that is no number
        raise CheckpointError(f"{folder} does not fit this model: {error}", fix=_own_base(config)) from error
    _widen_meta_tokens(adapted)
    _save_without_asking(adapted)
    _check_fit(folder, tensors, adapted)
    if without_memory:  # the tensors then take the places of the model's own, number format and all
        tensors = {name: held.to(torch.promote_types(held.dtype, torch.float32)) for name, held in tensors.items()}
        for module in adapted.modules():
            if isinstance(module, BaseTunerLayer):  # which would follow its base to the meta device
                module._move_adapter_to_device_of_base_layer = lambda *_: None
    set_peft_model_state_dict(adapted, tensors, ADAPTER, low_cpu_mem_usage=without_memory)
    # Widening the factors, PEFT lets those of an embedding be trained again.
    return adapted if trainable else adapted.eval().requires_grad_(False)


@contextlib.contextmanager
def _quiet_peft() -> Iterator[None]:
    with warnings.catch_warnings():
        # PEFT asks transformers by a name that transformers is leaving.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def _save_without_asking(model: PeftModel) -> None:
    """Left to itself, PEFT asks the Hub at every saving whether the vocabulary has grown."""
    model.save_pretrained = functools.partial(model.save_pretrained, save_embedding_layers=False)


def _widen_meta_tokens(model: PeftModel) -> None:
    """Do for meta tokens that are trained as a whole what PEFT does for factors: steps below 1/256 move no bfloat16."""
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            tokens = module.modules_to_save[ADAPTER]
            tokens.to(torch.promote_types(tokens.weight.dtype, torch.float32))


def _without(rows: slice) -> Callable[[Tensor], Tensor]:
    def zero(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient[rows] = 0
        return gradient

    return zero


def read_config(folder: Path) -> LoraConfig:
    """Read the configuration of an adapter.

    Raises:
        CheckpointError: If it is missing or unreadable, is not LoRA's, or tells of a base model that cannot be had.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist, so {folder} holds no adapter.")
    try:
        check_initialization(json.loads(path.read_text(encoding="utf-8")), folder)  # which PEFT warns of, or fails at
        config = PeftConfig.from_pretrained(folder)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, LoraConfig):
        kind = getattr(config.peft_type, "value", None)
        raise CheckpointError(f"{path} is not LoRA's: its peft_type is {kind}.", expected="LORA")
    return config


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        raise CheckpointError(
            f"{path} does not exist.", expected="an adapter's weights as safetensors, no other format"
        )
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is cut short or broken: {error}", fix="copy or download it again") from error
    return tensors


def _check_fit(folder: Path, tensors: dict[str, Tensor], model: PeftModel) -> None:
    needed = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    for name in sorted(needed.keys() | tensors.keys()):
        if name not in tensors:
            problem = f"{name} is missing"
        elif name not in needed:
            problem = f"{name} has no place in this model"
        elif tensors[name].shape != needed[name].shape:
            problem = f"{name} is {tuple(tensors[name].shape)}, expected {tuple(needed[name].shape)}"
        else:
            continue
        raise CheckpointError(
            f"{folder / SAFETENSORS_WEIGHTS_NAME} does not fit this model: {problem}.",
            fix=_own_base(model.peft_config[ADAPTER]),
        )


def _own_base(config: LoraConfig) -> str:
    return f"load it on the model it was made for, {config.base_model_name_or_path}"

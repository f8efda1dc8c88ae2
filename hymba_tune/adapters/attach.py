"""Attaches an adapter to a model: a new one, or a saved one."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

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
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from hymba_tune.adapters.initialization import ADAPTER
from hymba_tune.adapters.low_rank import use_fewer_operations
from hymba_tune.adapters.presets import rows_outside
from hymba_tune.adapters.settings import read_settings
from hymba_tune.adapters.vocabulary import (
    EMBEDDING,
    HEAD,
    SAVED,
    saved_embeddings,
    vocabulary_with,
    widen_vocabulary,
)
from hymba_tune.checkpoint import check_dtype, read_header
from hymba_tune.errors import CheckpointError, ConfigError


def add_adapter(model: PreTrainedModel, config: LoraConfig, targets: Sequence[str]) -> PeftModel:
    """Attach a new adapter to a model, in place. The logits do not change.

    The trained parameters are float32, whatever the dtype of the model.

    Args:
        model: A Hymba model.
        config: The configuration from `lora_config`.
        targets: The targets that were passed to `lora_config`.

    Raises:
        ConfigError: If the preset adapts only some rows and the method is DoRA.
    """
    with _quiet_peft():
        adapted = get_peft_model(model, config)
    _widen_copies(adapted)
    for module in adapted.modules():
        # PEFT computes the magnitudes in the model's dtype and casts them to float32 afterwards. Rounded to bfloat16,
        # they are not the norms of the weights, and the new adapter would change the model.
        if isinstance(module, LoraLayer) and ADAPTER in module.lora_variant:
            module.lora_variant[ADAPTER].init(module, ADAPTER)
    _save_offline(adapted)
    use_fewer_operations(adapted)
    restrict_rows(adapted, targets)
    return adapted


def restrict_rows(model: PeftModel, targets: Sequence[str]) -> None:
    """Exclude the rows of `in_proj` outside of an `attention` or `ssm` preset from further training.

    The adapter's files do not store this restriction: apply it again to a loaded adapter before training it, and
    to a model that FSDP has divided, whose parameters are new ones.

    Args:
        model: The model with its adapter.
        targets: The targets, as `lora_config` takes them. Nothing happens unless they are one of the two presets.

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
        weight = layer.mamba.in_proj.lora_B[ADAPTER].weight
        if isinstance(weight, DTensor):
            weight.register_post_accumulate_grad_hook(_without_divided(rows, weight))
        else:
            weight.register_hook(_without(rows))


ROWS = "token_adapter.trainable_tokens_delta"
"""The name of trained rows in a module; PEFT repeats those of an embedding for a head that is tied to it."""


def load_adapter(model: PreTrainedModel, folder: Path, *, trainable: bool = False) -> PeftModel:
    """Attach a saved adapter to a model, in place.

    Args:
        model: The base model, which gets rows for the tokens that the adapter adds. A model on the meta device stays
            there, and only the adapter takes memory.
        folder: The folder with `adapter_config.json` and `adapter_model.safetensors`.
        trainable: Whether the adapter will be trained further; see also `restrict_rows`.

    Raises:
        CheckpointError: If a file is missing or broken, or if the adapter's tensors do not match the model.
    """
    config = read_config(folder)
    tensors = _read_tensors(folder)
    _check_rank(folder, config, tensors)
    _check_copies(folder, config, model)
    config.inference_mode = not trainable
    vocabulary = model.config.vocab_size
    widen_vocabulary(model, vocabulary_with(config, vocabulary, folder))
    without_memory = model.device.type == "meta"
    try:
        with _quiet_peft():
            adapted = PeftModelForCausalLM(model, config, ADAPTER, low_cpu_mem_usage=without_memory)
    except Exception as error:  # PEFT found no target module, or fails in its own way at settings that do not fit
        raise CheckpointError(f"{folder} does not fit this model: {error}", fix=_load_on_own_base(config)) from error
    _widen_copies(adapted)
    _save_offline(adapted)
    use_fewer_operations(adapted)
    saved, tensors = _divide(tensors, adapted)
    _check_fit(folder, tensors, saved, adapted)
    _check_embeddings(folder, tensors, saved, adapted, vocabulary)
    if not without_memory:
        _set_embeddings(adapted, saved)
    if without_memory:  # PEFT then assigns the loaded tensors as they are, instead of copying their values
        tensors = {
            name: tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for name, tensor in tensors.items()
        }
        for module in adapted.modules():
            if isinstance(module, BaseTunerLayer):  # would otherwise move the adapter to the meta device
                module._move_adapter_to_device_of_base_layer = lambda *_: None
    try:
        set_peft_model_state_dict(adapted, tensors, ADAPTER, low_cpu_mem_usage=without_memory)
    except KeyError as error:  # names of modules that match parts of others
        raise CheckpointError(
            f"PEFT cannot load {folder}, although it has saved it: there is no {error}.",
            expected="copies of modules that do not contain each other: modules_to_save",
        ) from error
    # When PEFT casts the factors of an embedding to float32, it makes them trainable again.
    return adapted if trainable else adapted.eval().requires_grad_(False)


def _check_copies(folder: Path, config: LoraConfig, model: PreTrainedModel) -> None:
    """Check that a model has the modules of which an adapter holds copies; PEFT passes over those it does not find."""
    modules = [name for name, _ in model.named_modules()]
    for copied in config.modules_to_save or []:
        if not any(name.endswith(copied) for name in modules):
            raise CheckpointError(
                f"{folder} does not fit this model: modules_to_save has {copied!r}, and the model has no such module.",
                fix=_load_on_own_base(config),
            )


@contextlib.contextmanager
def _quiet_peft() -> Iterator[None]:
    with warnings.catch_warnings():
        # PEFT reads an attribute that transformers has deprecated.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        # It warns of what merging takes care of: heads that an adapter unties.
        warnings.filterwarnings("ignore", "Model (has|with) `tie_word_embeddings=True`", UserWarning)
        warnings.filterwarnings("ignore", "You have requested `ensure_weight_tying`", UserWarning)
        yield


def _save_offline(model: PeftModel) -> None:
    """Stop PEFT from asking the Hub, whenever the adapter is saved, whether the vocabulary has grown."""
    model.save_pretrained = functools.partial(model.save_pretrained, save_embedding_layers=False)


def _widen_copies(model: PeftModel) -> None:
    """Cast fully trained meta tokens and rows to float32, as PEFT does factors: bfloat16 rounds small steps away."""
    for module in model.modules():
        if isinstance(module, TrainableTokensLayer):
            rows = module.trainable_tokens_delta[ADAPTER]
            rows.data = rows.data.to(torch.promote_types(rows.dtype, torch.float32))
        if isinstance(module, ModulesToSaveWrapper):
            for parameter in module.modules_to_save[ADAPTER].parameters():
                parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))


def _without(rows: slice) -> Callable[[Tensor], Tensor]:
    def zero(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient[rows] = 0
        return gradient

    return zero


def _without_divided(rows: slice, weight: DTensor) -> Callable[[Tensor], None]:
    """Return a hook on a divided parameter, whose gradient never passes through the hooks of a tensor."""
    mask = torch.ones(weight.shape)
    mask[rows] = 0
    divided = distribute_tensor(mask.to(weight.device), weight.device_mesh, weight.placements)

    def zero(parameter: Tensor) -> None:
        assert parameter.grad is not None
        parameter.grad *= divided

    return zero


def read_config(folder: Path) -> LoraConfig:
    """Read the configuration of an adapter.

    Raises:
        CheckpointError: If it is missing or unreadable, if the adapter cannot be merged, or if its initialization
            changed the base model in a way that cannot be repeated.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist, so {folder} contains no adapter.")
    read_settings(path)  # before PEFT warns or fails
    try:
        config = PeftConfig.from_pretrained(folder)
    except Exception as error:  # PEFT raises errors of many kinds for settings that contradict each other
        raise CheckpointError(f"{path} cannot be used: {error}", fix="copy or download it again") from error
    assert isinstance(config, LoraConfig)  # as `read_settings` has checked
    return config


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    check_tensors(folder)
    tensors: dict[str, Tensor] = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
    return tensors


def check_tensors(folder: Path) -> None:
    """Check the header of an adapter's weights, without reading them.

    Raises:
        CheckpointError: If there is no such file, its header lies, or a tensor is no float.
    """
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist.", expected="the weights of an adapter, only as safetensors")
    for name, tensor in read_header(path).items():
        check_dtype(path, name, tensor)


def _check_rank(folder: Path, config: LoraConfig, tensors: dict[str, Tensor]) -> None:
    """Refuse a rank that no tensor has, before PEFT allocates factors of that size."""
    stated = max([config.r, *(config.rank_pattern or {}).values()])
    largest = max((size for tensor in tensors.values() for size in tensor.shape), default=0)
    if stated > largest:
        raise CheckpointError(
            f"{folder / CONFIG_NAME}: the rank is {stated:,}, and no tensor of the adapter is that large.",
            expected="the rank with which it was trained",
            fix=f"correct r and rank_pattern, or copy {CONFIG_NAME} again",
        )


def embeddings_of(folder: Path, model: PeftModel) -> dict[str, Tensor]:
    """Return the embedding and the head that PEFT has saved with an adapter; see `saved_embeddings`.

    Args:
        folder: The adapter's folder.
        model: The model of `load_adapter`.
    """
    return _divide(_read_tensors(folder), model)[0]


def _divide(tensors: dict[str, Tensor], model: PeftModel) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Divide the tensors of an adapter into matrices of its base model, by their names there, and trained tensors."""
    trained = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False).keys()
    rows, same_rows = (tensors.get(f"base_model.model.{module}.{ROWS}") for module in (EMBEDDING, HEAD))
    repeated = rows is not None and same_rows is not None and torch.equal(rows, same_rows)
    others = {
        name: tensor
        for name, tensor in tensors.items()
        if name in trained or not (SAVED.fullmatch(name) or (repeated and tensor is same_rows))
    }
    return saved_embeddings(tensors, trained), others


def _set_embeddings(model: PeftModel, saved: dict[str, Tensor]) -> None:
    """Set the embedding and the head below an adapter, in place: tied ones stay tied."""
    for name, tensor in saved.items():
        module: Any = model.get_base_model().get_submodule(name.removesuffix(".weight"))
        if isinstance(module, AuxiliaryTrainingWrapper):
            module = module.original_module
        if isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        module.weight.data.copy_(tensor)


def _check_fit(folder: Path, tensors: dict[str, Tensor], saved: dict[str, Tensor], model: PeftModel) -> None:
    needed = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    config = model.get_base_model().config
    for name, tensor in saved.items():
        needed |= {name: torch.empty(config.vocab_size, config.hidden_size, device="meta")}
        tensors = tensors | {name: tensor}
    for name in sorted(needed.keys() | tensors.keys()):
        if name not in tensors:
            problem = f"{name} is missing"
        elif name not in needed:
            problem = f"{name} is unexpected"
        elif tensors[name].shape != needed[name].shape:
            problem = f"{name} has shape {tuple(tensors[name].shape)}, expected {tuple(needed[name].shape)}"
        else:
            continue
        raise CheckpointError(
            f"{folder / SAFETENSORS_WEIGHTS_NAME} does not fit this model: {problem}.",
            fix=_load_on_own_base(model.peft_config[ADAPTER]),
        )


def _check_embeddings(
    folder: Path, tensors: dict[str, Tensor], saved: dict[str, Tensor], model: PeftModel, vocabulary: int
) -> None:
    """Check that the matrices of the base model that an adapter contains agree, and that none of them is missing."""
    problem = None
    if model.get_base_model().config.tie_word_embeddings:
        if len(saved) == 2 and not torch.equal(*saved.values()):
            problem = "contains an embedding and a head that differ, and its base model has one matrix for both"
    elif any(len(tensor) != vocabulary for tensor in saved.values()):
        for module in (EMBEDDING, HEAD):
            if f"{module}.weight" not in saved and f"base_model.model.{module}.weight" not in tensors:
                problem = f"was trained on a model with a resized vocabulary, and PEFT has not saved its {module}"
    if problem is not None:
        raise CheckpointError(
            f"{folder / SAFETENSORS_WEIGHTS_NAME} {problem}.",
            fix="save it again with modules_to_save embed_tokens and lm_head, or merge it where it was trained",
        )


def _load_on_own_base(config: LoraConfig) -> str:
    return f"load it on its own base model, {config.base_model_name_or_path}"

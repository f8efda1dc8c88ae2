"""What a run works with, once its settings are checked and its data is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import datasets
import torch
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hymba_tune.adapters import add_adapter, count_parameters, lora_config, tokenizer_of, weights_of
from hymba_tune.checkpoint import (
    check_weights,
    choose_device,
    choose_dtype,
    choose_kernels,
    load_config,
)
from hymba_tune.config import Method, ReferenceConfig, Scheme, Start, TrainingConfig, as_mapping
from hymba_tune.data import Conversation, DataReport, with_chat_template
from hymba_tune.errors import ConfigError
from hymba_tune.inputs import check_inputs
from hymba_tune.model.backends import Choice
from hymba_tune.ranks import check_single_process
from hymba_tune.registry import ModelSource, lasting_name, resolve_model
from hymba_tune.schemes import quantization, scheme_of, stored_quantization
from hymba_tune.train.limits import check_disk, disk_needed
from hymba_tune.train.run import Run
from hymba_tune.train.tracking import check_trackers


@dataclass(frozen=True)
class Setup:
    """What a run works with, checked before any weights are loaded."""

    run: Run
    config: TrainingConfig
    source: ModelSource
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    dtype: torch.dtype
    model_config: PretrainedConfig
    kernels: dict[str, Choice]

    @cached_property
    def quantization(self) -> BitsAndBytesConfig | None:
        """Of the weights below the adapter, which are stored so already or are to be."""
        return weights_quantization(self.config, self.model_config, self.dtype)

    @property
    def scheme(self) -> Scheme | None:
        """How the weights below the adapter are stored, if in fewer bits."""
        return scheme_of(self.quantization) if self.quantization else None

    @property
    def continues(self) -> bool:
        """Whether the adapter of ``source`` is gone on with, rather than a new one made."""
        return _continues(self.config)

    @property
    def base(self) -> str:
        """The name under which the model below the trained adapter is found again; a run's stands for its result."""
        return str(self.source.base) if self.continues else lasting_name(self.config.model)

    @property
    def weights_dtype(self) -> torch.dtype:
        """Float32 where all weights are trained, and ``dtype`` only computed in: it would round small steps away."""
        return torch.float32 if self.config.method is Method.full else self.dtype


@dataclass(frozen=True)
class Data:
    """Encoded rows, and a few prompts with their answers.

    Attributes:
        train: Rows as the kind's trainer takes them.
        held_out: Such rows to evaluate on, source by source, if any.
        held_out_sources: How many of them are of each source, in their order.
        report: What became of the rows to train on.
        summary: How much data there is, in words, for the banner.
        prompts: What is answered before and after training, and what the data answers.
        length_warning: Said where texts are longer than the model was made for.
    """

    train: datasets.Dataset
    held_out: datasets.Dataset | None
    held_out_sources: Mapping[str, int]
    report: DataReport
    summary: list[str]
    prompts: list[tuple[Conversation, str]]
    length_warning: str | None


def check(config: TrainingConfig) -> Setup:
    """Look at all that can be looked at before the data is read and the weights are downloaded and loaded.

    Raises:
        HymbaTuneError: If something is to be mended first.
    """
    check_single_process()
    check_trackers(config.track)
    check_inputs(config)
    run = Run(config.resume) if config.resume else Run.choose(config)
    device = choose_device(config.device)
    if config.activation_offload and device.type != "cuda":
        raise ConfigError(
            f"--activation-offload moves activations off a GPU, and this run is on {device.type}.",
            fix="leave it out; --gradient-checkpointing saves memory on any device",
        )
    dtype = choose_dtype(config.dtype, device)
    source = resolve_model(config.model)
    tokenizer = with_chat_template(tokenizer_of(source), config.chat_template)
    weights = weights_of(source)
    model_config = load_config(weights)
    if weights.hub_id is None:
        check_weights(weights.folder, model_config)
    check_quantization(config, source, model_config)
    weights_quantization(config, model_config, dtype)
    trained, total = count_parameters(lay_out(config, model_config, torch.float32))
    check_disk(run, disk_needed(config, trained=trained, total=total))
    kernels = choose_kernels(as_mapping(config.kernels), model_config, device, dtype)
    return Setup(run, config, source, tokenizer, device, dtype, model_config, kernels)


def weights_quantization(
    config: TrainingConfig, model_config: PretrainedConfig, dtype: torch.dtype
) -> BitsAndBytesConfig | None:
    """How the weights below the adapter are stored already or are to be stored, if in fewer bits.

    Args:
        config: Of the run.
        model_config: Of the weights.
        dtype: What is computed in.

    Raises:
        ConfigError: If nothing in the model can be stored so.
    """
    stored = stored_quantization(model_config)
    return quantization(model_config, config.quantize, dtype) if config.quantize and stored is None else stored


def check_quantization(config: TrainingConfig, source: ModelSource, model_config: PretrainedConfig) -> None:
    """See that weights that are quantized, or are to be, can be trained as asked.

    Raises:
        ConfigError: If not.
    """
    stored = stored_quantization(model_config)
    scheme = scheme_of(stored) if stored else None
    if source.adapter is not None and (scheme or config.quantize) and not _continues(config):
        raise ConfigError(
            f"{source.name} is an adapter: it has to be folded in before its model is quantized.",
            fix=f"hymba-tune merge {config.model} --out merged, then --model merged",
        )
    if scheme is None:
        return
    if config.quantize not in (None, scheme):
        raise ConfigError(
            f"--quantize {config.quantize}: {source.name} is quantized already, to {scheme}.", fix="leave it out"
        )
    if config.method is Method.full:
        raise ConfigError(
            f"--method full trains every weight, and those of {source.name} are quantized ({scheme}).",
            fix="--method lora, or a model that is not quantized",
        )
    if config.method is Method.dora and scheme is Scheme.int8:
        raise ConfigError(
            f"--method dora needs the norms of the weights, and those of {source.name} are quantized to int8, which "
            "PEFT cannot take apart for it.",
            fix="--method lora",
        )


def _continues(config: TrainingConfig) -> bool:
    return isinstance(config, ReferenceConfig) and config.start is Start.continue_


def lay_out(config: TrainingConfig, model_config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model to be trained, its adapter on, without memory for it: on the meta device.

    Args:
        config: Of the run.
        model_config: Of the model.
        dtype: Its number format.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config, dtype=dtype)
        if config.method is not Method.full:
            model = add_adapter(model, adapter_config(config, model), config.targets)
    return model


def adapter_config(config: TrainingConfig, model: PreTrainedModel) -> Any:
    """PEFT's configuration of the adapter that the settings ask for."""
    return lora_config(
        model,
        targets=config.targets,
        method=config.method,
        rank=config.rank,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        rslora=config.rslora,
        meta_tokens=config.meta_tokens,
    )

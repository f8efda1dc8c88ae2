"""The setup of a run: its checked settings, and its data."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import datasets
import torch
from transformers import (
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hymba_tune.adapters import (
    add_adapter,
    check_tensors,
    count_parameters,
    lora_config,
    plain_config,
    reason_against_continuing,
    sources_of,
    tokenizer_of,
    tokens_past,
    weights_of,
)
from hymba_tune.checkpoint import (
    check_cuda_graphs,
    check_weights,
    choose_device,
    choose_dtype,
    choose_kernels,
    load_config,
)
from hymba_tune.config import LaunchOptions, Method, ReferenceConfig, Scheme, Start, TrainingConfig, as_mapping
from hymba_tune.data import Conversation, DataReport, with_chat_template
from hymba_tune.distributed.processes import agree, first_of_node, from_main, join
from hymba_tune.errors import ConfigError, command
from hymba_tune.evaluate.questions import Extraction
from hymba_tune.inputs import check_inputs
from hymba_tune.model import HymbaForSequenceClassification
from hymba_tune.model.backends import Choice
from hymba_tune.registry import ModelSource, lasting_name, resolve_model
from hymba_tune.schemes import WeightQuantization, decide_quantization, stored_quantization
from hymba_tune.train.limits import check_disk, disk_needed
from hymba_tune.train.run import LIBRARIES, Run
from hymba_tune.train.tracking import check_trackers


@dataclass(frozen=True)
class Setup:
    """What a run works with, checked before any weights are loaded.

    Attributes:
        run: The run's directory.
        config: The run's settings.
        source: The model that training starts from.
        tokenizer: The model's tokenizer, with the chat template.
        device: The device of the run.
        dtype: The dtype of the computation.
        model_config: The configuration of the model's weights.
        quantization: The quantization of the base weights, whether stored already or applied when they are loaded.
        kernels: The kernel chosen for each operation.
        parameters: The number of the model's parameters, without a new adapter.
        added_tokens: The tokens for which rows are added to the embedding and the head, and trained.
    """

    run: Run
    config: TrainingConfig
    source: ModelSource
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    dtype: torch.dtype
    model_config: PretrainedConfig
    quantization: WeightQuantization | None
    kernels: dict[str, Choice]
    parameters: int
    added_tokens: Sequence[int] = ()

    @property
    def scheme(self) -> Scheme | None:
        """The quantization scheme of the base weights, if there is one."""
        return self.quantization.scheme if self.quantization else None

    @property
    def continues(self) -> bool:
        """Whether the adapter of ``source`` is trained further; otherwise a new one is added."""
        return _continues(self.config)

    @property
    def base(self) -> str:
        """The name from which the base model of the trained adapter can be loaded; for a run, its result."""
        return str(self.source.base) if self.continues else lasting_name(self.config.model)

    @property
    def weights_dtype(self) -> torch.dtype:
        """The dtype of the weights: float32 where all are trained, as ``dtype`` would round small steps away."""
        return torch.float32 if self.config.method is Method.full else self.dtype


@dataclass(frozen=True)
class Data:
    """Encoded rows, and a few prompts with their answers.

    Attributes:
        train: The rows to train on, in the trainer's columns.
        held_out: The rows to evaluate on, source by source, if any.
        held_out_sources: The number of held-out rows of each source, in their order.
        report: The counts of training rows that were read, used and dropped.
        summary: The amount of data, in words, for the banner.
        prompts: The prompts of the held-out data, or of the training data where there is none, with their answers. The
            first few are answered before and after training.
        length_warning: A warning where texts are longer than the model's context.
        extract: Returns the part of an answer that is compared; None unless all ``prompts`` are answered and the right
            answers are counted.
        rate: Returns the reward of an answer to a prompt with this reference, in words; None where there is none.
    """

    train: datasets.Dataset
    held_out: datasets.Dataset | None
    held_out_sources: Mapping[str, int]
    report: DataReport
    summary: list[str]
    prompts: list[tuple[Conversation, str]]
    length_warning: str | None
    extract: Extraction | None = None
    rate: Callable[[Conversation, str, str], str] | None = None


def check(config: TrainingConfig) -> Setup:
    """Check everything that can be checked before data is read and weights are downloaded and loaded.

    Raises:
        HymbaTuneError: If a setting, a file or the machine must be changed first.
    """
    check_trackers(config.track)
    check_inputs(config)
    device = choose_device(config.device)
    join(device, start_timeout=config.start_timeout, step_timeout=config.step_timeout)
    agree(_facts(config))
    run = Run(config.resume) if config.resume else from_main(lambda: Run.choose(config), "choosing the run's folder")
    if config.activation_offload and device.type != "cuda":
        raise ConfigError(
            f"--activation-offload moves activations from a GPU to the CPU, and this run is on {device.type}.",
            fix="leave it out; --gradient-checkpointing saves memory on any device",
        )
    if config.cuda_graphs:
        check_cuda_graphs(device)
    dtype = choose_dtype(config.dtype, device)
    with first_of_node("finding the model"):
        source = resolve_model(config.model)
    tokenizer = with_chat_template(tokenizer_of(source, resize=config.resize), config.chat_template)
    weights = weights_of(source)
    model_config = load_config(weights)
    if weights.hub_id is None:
        check_weights(weights.folder, model_config)
    for found in sources_of(source):
        if found.adapter is not None and found.hub_id is None:
            check_tensors(found.adapter)
    merged = plain_config(source)
    model_config.vocab_size, model_config.tie_word_embeddings = merged.vocab_size, merged.tie_word_embeddings
    if _continues(config) and (reason := reason_against_continuing(source)) is not None:
        raise ConfigError(f"--start continue: the adapter {source.name} {reason}.", fix="--start merge")
    if config.verb.scores and source.adapter is not None:
        raise ConfigError(
            f"{source.name} is an adapter, and other libraries, which are to load the reward model, would not find the "
            "model below it.",
            fix=f"{command('merge', config.model, '--out', 'merged')}, then --model merged",
        )
    added_tokens = _added_tokens(config, tokenizer, model_config)
    quantization = base_quantization(config, source, model_config, dtype)
    trained, total = count_parameters(lay_out(config, model_config, torch.float32, added_tokens))
    check_disk(run, disk_needed(config, trained=trained, total=total))
    kernels = choose_kernels(as_mapping(config.kernels), model_config, device, dtype)
    size = total if config.method is Method.full else total - trained
    return Setup(run, config, source, tokenizer, device, dtype, model_config, quantization, kernels, size, added_tokens)


def _facts(config: TrainingConfig) -> dict[str, str]:
    """Return what must be the same in all processes, by what it is called."""
    versions = {name: metadata.version(name) for name in LIBRARIES}
    of_this_machine = {"out", "resume", "device", "accelerate_config", *LaunchOptions.model_fields}
    settings = config.model_dump_json(exclude=of_this_machine)
    return versions | {"the settings": hashlib.sha256(settings.encode()).hexdigest()[:12]}


def base_quantization(
    config: TrainingConfig, source: ModelSource, model_config: PretrainedConfig, dtype: torch.dtype
) -> WeightQuantization | None:
    """Decide how the base weights are quantized, and check that the run's method can train an adapter on them.

    Raises:
        ConfigError: If the weights cannot be quantized, or an adapter cannot be trained on them.
    """
    merges = source.adapter is not None and not _continues(config)
    if merges and (config.quantize or stored_quantization(model_config)):
        raise ConfigError(
            f"{source.name} is an adapter: it has to be merged before its model is quantized.",
            fix=f"{command('merge', config.model, '--out', 'merged')}, then --model merged",
        )
    quantization = decide_quantization(model_config, config.quantize, dtype, flag="--quantize", name=source.name)
    if quantization is None:
        return None
    scheme = quantization.scheme
    if config.method is Method.full:
        raise ConfigError(
            f"--method full trains every weight, and those of {source.name} are quantized ({scheme}).",
            fix="--method lora, or a model that is not quantized",
        )
    if config.method is Method.dora and scheme is Scheme.int8:
        raise ConfigError(
            f"--method dora needs the norms of the weights, and those of {source.name} are quantized to int8, which "
            "PEFT cannot dequantize for DoRA.",
            fix="--method lora",
        )
    return quantization


def _continues(config: TrainingConfig) -> bool:
    return isinstance(config, ReferenceConfig) and config.start is Start.continue_


def _added_tokens(
    config: TrainingConfig, tokenizer: PreTrainedTokenizerBase, model_config: PretrainedConfig
) -> Sequence[int]:
    """Return the tokens that the model lacks, and enlarge the vocabulary of its configuration by them."""
    past = tokens_past(tokenizer, model_config.vocab_size)
    if past and _continues(config):
        raise ConfigError(
            f"--resize adds rows for {next(iter(past.values()))[:80]} and other tokens with a new adapter, and "
            "--start continue trains the present one.",
            fix="--start merge",
        )
    added = range(model_config.vocab_size, max(past, default=model_config.vocab_size - 1) + 1)
    model_config.vocab_size += len(added)
    return added


def lay_out(
    config: TrainingConfig, model_config: PretrainedConfig, dtype: torch.dtype, added_tokens: Sequence[int] = ()
) -> PreTrainedModel:
    """Return the model to be trained, with its adapter, on the meta device, where it takes no memory.

    Args:
        config: The run's settings.
        model_config: The model's configuration.
        dtype: The dtype of the weights.
        added_tokens: The tokens whose rows are added, as in `Setup`.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config, dtype=dtype)
        if config.verb.scores:
            model = HymbaForSequenceClassification.on_layers_of(model, num_labels=1)
        if config.method is not Method.full:
            model = add_adapter(model, adapter_config(config, model, added_tokens), config.targets)
    return model


def adapter_config(config: TrainingConfig, model: PreTrainedModel, added_tokens: Sequence[int]) -> Any:
    """Return PEFT's configuration of the adapter."""
    return lora_config(
        model,
        targets=config.targets,
        method=config.method,
        rank=config.rank,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        rslora=config.rslora,
        meta_tokens=config.meta_tokens,
        added_tokens=added_tokens,
    )

"""Planning: the memory and time that a run would need on common GPUs and on this machine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from hymba_tune.adapters import count_parameters, tokenizer_of, weights_of
from hymba_tune.checkpoint import choose_device, choose_dtype, choose_kernels, load_config
from hymba_tune.config import DistillConfig, Method, Scheme, TrainingConfig, as_mapping
from hymba_tune.data import open_sources, with_chat_template
from hymba_tune.data.checking import check_sources
from hymba_tune.distributed.accelerate_file import with_accelerate_config
from hymba_tune.distributed.checks import accumulation
from hymba_tune.errors import DataError, command
from hymba_tune.footprint import GPU_RESERVE, Footprint, Sharding, StepMemory, device_memory, process_overhead
from hymba_tune.footprint.cards import CARDS, ETHERNET, PCIE, Card
from hymba_tune.footprint.rates import measured_speeds
from hymba_tune.footprint.rollouts import rollout_seconds
from hymba_tune.footprint.traffic import Collective, bytes_sent, step_traffic
from hymba_tune.footprint.work import Work, step_work
from hymba_tune.inputs import check_inputs
from hymba_tune.registry import ModelSource, resolve_model
from hymba_tune.schemes import decide_quantization, stored_bytes
from hymba_tune.train.by_size import default_epochs
from hymba_tune.train.memory_estimate import full_batch, step_settings
from hymba_tune.train.setup import base_quantization, lay_out

SHORTEST = 256
"""The fewest tokens of a row that are proposed."""


@dataclass(frozen=True)
class DeviceEstimate:
    """A run on one device.

    Attributes:
        device: The device's name.
        has: The device's bytes.
        needs: The bytes that the run needs of it: a process on a GPU, all those of this machine on its CPU.
        tokens_per_s: The tokens a second that the run may reach in all processes together.
        nf4: The bytes that the run needs with weights quantized to NF4; None where they cannot be.
        change: The flags that make the run fit; empty where it fits, None where no flags do.
        seconds: The seconds that the run's steps may take, where its length is known.
    """

    device: str
    has: int
    needs: int
    nf4: int | None
    tokens_per_s: float
    change: str | None
    seconds: float | None = None

    @property
    def fits(self) -> bool:
        """Whether the run fits as it is."""
        return self.needs <= self.has


@dataclass(frozen=True)
class Length:
    """The length of a run.

    Attributes:
        steps: The number of optimizer steps.
        tokens: The tokens of all steps.
    """

    steps: int
    tokens: int


@dataclass(frozen=True)
class Plan:
    """The memory and time that a run would need.

    Attributes:
        model: The model's name.
        settings: The settings that matter to memory, in words.
        processes: The number of processes, one a GPU.
        strategy: What they share.
        rows_per_step: The rows in an optimizer step, over all processes.
        tokens_per_step: The most tokens in an optimizer step, over all processes.
        bytes_sent: The bytes that each process sends in an optimizer step.
        dtype: The dtype on GPUs.
        parts: The bytes on a GPU, by part.
        gpus: The estimate for each GPU.
        here: The estimate for this machine's device.
        length: The length of the run, where --steps or --data determine it.
    """

    model: str
    settings: str
    processes: int
    strategy: str
    rows_per_step: int
    tokens_per_step: int
    bytes_sent: float
    dtype: str
    parts: Footprint
    gpus: list[DeviceEstimate]
    here: DeviceEstimate
    length: Length | None


def plan(config: TrainingConfig, progress: Callable[[int], None] | None = None) -> Plan:
    """Estimate the memory and time of a run whose rows all have --max-length tokens, the most that it can need.

    It reads the model's configuration, and the data, if given, for the length of the run.

    Args:
        config: The run's settings.
        progress: Called with the number of rows read so far.

    Raises:
        HymbaTuneError: If the model, the device, the data or a setting cannot be used.
    """
    check_inputs(config, complete=False)
    if config.accelerate_config is not None:
        config = with_accelerate_config(config)
    processes = Sharding.of(config).processes
    if config.global_batch is not None:
        grad_accum = accumulation(config.global_batch, config.batch_size, processes)
        config = config.model_copy(update={"grad_accum": grad_accum})
    device = choose_device(config.device)
    source = resolve_model(config.model)
    model_config = load_config(weights_of(source))
    dtype = choose_dtype(config.dtype, device)
    gpu_dtype = _gpu_dtype(config.dtype)
    choose_kernels(as_mapping(config.kernels), model_config, device, dtype)
    base_quantization(config, source, model_config, gpu_dtype)
    model = _lay_out(config, model_config, gpu_dtype)
    trained, size = count_parameters(model)
    size -= 0 if config.method is Method.full else trained
    extra_bytes = _teacher(config, model_config, device)
    memory = _Memory(StepMemory(model, dtype=gpu_dtype, own_kernels=False), model_config, gpu_dtype, extra_bytes)
    parts, in_nf4 = memory.of(config), memory.in_nf4(config)
    work = memory.work(config)
    gpus = []
    for size, card in CARDS.items():
        has = size * 2**30
        needs = parts.total + GPU_RESERVE
        change = _change(config, memory, has - GPU_RESERVE)
        nf4 = None if in_nf4 is None else in_nf4 + GPU_RESERVE
        computing = work.seconds(card.speeds)
        rollouts = rollout_seconds(config, model, card.speeds, parts.weights)
        speed = 1 / (1 / memory.speed_of_all(config, computing, card) + rollouts)
        gpus.append(DeviceEstimate(f"{size} GB ({card.name})", has, needs, nf4, speed, change))
    if dtype is not gpu_dtype or device.type != "cpu" or config.kernels:
        model = _lay_out(config, model_config, dtype)
        memory = _Memory(
            StepMemory(model, dtype=dtype, own_kernels=device.type == "cpu"), model_config, dtype, extra_bytes
        )
    here = _here(config, memory, device, dtype, model)
    length = run_length(config, source, size, progress)
    return Plan(
        source.name,
        _in_words(config),
        processes,
        config.strategy,
        config.batch_size * config.grad_accum * processes,
        full_batch(config).tokens * config.grad_accum * processes,
        bytes_sent(memory.traffic(config), processes),
        str(gpu_dtype).removeprefix("torch."),
        parts,
        [_timed(gpu, length) for gpu in gpus],
        _timed(here, length),
        length,
    )


def _teacher(config: TrainingConfig, student: Any, device: torch.device) -> int:
    """Return the bytes of a teacher; 0 where there is none."""
    if not isinstance(config, DistillConfig):
        return 0
    from hymba_tune.distill.memory import plan_teacher  # imported here because it takes a second

    return plan_teacher(config, student, device)


def _timed(estimate: DeviceEstimate, length: Length | None) -> DeviceEstimate:
    return replace(estimate, seconds=length.tokens / estimate.tokens_per_s) if length else estimate


def run_length(
    config: TrainingConfig, source: ModelSource, parameters: int, progress: Callable[[int], None] | None = None
) -> Length | None:
    """Return the length of a run from its data, or from --steps with full batches; None where neither is given.

    Args:
        config: The run's settings.
        source: The model.
        parameters: The number of the model's parameters, without a new adapter.
        progress: Called with the number of rows read so far.

    Raises:
        DataError: If the data cannot be read, or holds nothing to train on.
    """
    processes = Sharding.of(config).processes
    step_rows = config.batch_size * config.grad_accum * processes
    if not config.data:
        most = full_batch(config).tokens * config.grad_accum * processes
        return Length(config.steps, config.steps * most) if config.steps else None
    rows, tokens = _rows_and_tokens(config, source, progress)
    rows = tokens / config.max_length if config.packing else rows
    rows, tokens = rows * config.answers_per_row, tokens * config.answers_per_row  # answers as long as the references
    epochs = config.epochs or default_epochs(config, parameters, math.ceil(rows / step_rows))
    steps = config.steps or math.ceil(epochs * rows / step_rows)
    read = epochs * tokens if config.steps is None else steps * min(step_rows, rows) * tokens / rows
    return Length(steps, round(read))


def _rows_and_tokens(
    config: TrainingConfig, source: ModelSource, progress: Callable[[int], None] | None
) -> tuple[float, float]:
    """Return the rows and tokens of one epoch, without held-out rows."""
    sources = open_sources(config.data, config.weights, config.caps, escape=config.escape_special_tokens)
    tokenizer = with_chat_template(tokenizer_of(source), config.chat_template)
    rows = tokens = 0.0
    for one in sources:
        checked = check_sources(
            [one],
            tokenizer,
            max_length=config.max_length,
            mapping=as_mapping(config.map),
            learn=config.learn,
            progress=progress,
        )
        if problem := checked.files[0].problem:
            raise problem
        times = max(1.0, one.weight)  # rows of smaller weights are sampled while they are read
        rows += times * (checked.rows - checked.bad_rows - checked.too_long)
        tokens += times * checked.tokens
    if not rows:
        names = ", ".join(config.data)
        raise DataError(f"Nothing to train on in {names}.", fix=command("data", "check", *config.data))
    separate = bool(config.eval_data) or any(one.held_out for one in sources)
    train_share = 1.0 if separate else 1 - config.eval_split
    return train_share * rows, train_share * tokens


def _lay_out(config: TrainingConfig, model_config: Any, dtype: torch.dtype) -> Any:
    return lay_out(config, model_config, torch.float32 if config.method is Method.full else dtype)


def _gpu_dtype(name: str) -> torch.dtype:
    """Return the dtype on GPUs: every GPU of `CARDS` computes in bfloat16."""
    dtype: torch.dtype = torch.bfloat16 if name == "auto" else getattr(torch, name)
    return dtype


def _here(
    config: TrainingConfig, memory: _Memory, device: torch.device, dtype: torch.dtype, model: Any
) -> DeviceEstimate:
    overhead = process_overhead(device, dtype)
    has = device_memory(device)
    on_cpu = device.type == "cpu"
    # The processes of a machine share its memory and its cores.
    sharing = max(1, Sharding.of(config).processes // config.nnodes) if on_cpu else 1
    step = memory.of(config)
    needs = sharing * (step.total + overhead)
    in_nf4 = memory.in_nf4(config)
    speeds = measured_speeds(int(model.config.hidden_size), device, dtype)
    computing = memory.work(config).seconds(speeds)
    speed = full_batch(config).tokens / computing
    if not on_cpu:
        speed = memory.speed_of_all(config, computing, Card(str(device), 0, PCIE, 0))
    speed = 1 / (1 / speed + rollout_seconds(config, model, speeds, step.weights))
    nf4 = None if in_nf4 is None else in_nf4 + overhead
    return DeviceEstimate(
        f"{has / 2**30:.0f} GB (here: {device})", has, needs, nf4, speed, _change(config, memory, has - overhead)
    )


class _Memory:
    """Estimates a model's steps with any settings; unquantized layers are counted once."""

    def __init__(self, steps: StepMemory, model_config: Any, dtype: torch.dtype, extra_bytes: int) -> None:
        self._steps = steps
        self._model_config = model_config
        self._dtype = dtype
        self._extra_bytes = extra_bytes
        self._quantized: dict[Scheme | None, dict[str, int]] = {}

    def of(self, config: TrainingConfig) -> Footprint:
        """Estimate the bytes of a step at its peak."""
        quantized = self._quantized_bytes(config.quantize)
        step = self._steps.of(full_batch(config), **step_settings(config), quantized=quantized)
        return replace(step, extra_bytes=self._extra_bytes)

    def in_nf4(self, config: TrainingConfig) -> int | None:
        """Return the bytes of a step on weights in NF4; None where the weights are quantized already, or trained."""
        if not self.can_be_quantized(config):
            return None
        return self.of(config.model_copy(update={"quantize": Scheme.nf4})).total

    def can_be_quantized(self, config: TrainingConfig) -> bool:
        """Return whether the weights are neither quantized nor trained."""
        zero = config.strategy.startswith("zero")  # DeepSpeed divides no quantized weights
        return config.method is not Method.full and not zero and not self._quantized_bytes(config.quantize)

    def work(self, config: TrainingConfig) -> Work:
        """Return the work of a batch, with its share of the optimizer's step."""
        return step_work(
            self._steps.model,
            full_batch(config),
            dtype=self._steps.dtype,
            own_kernels=self._steps.own_kernels,
            checkpointing=config.gradient_checkpointing,
            optimizer=config.optimizer,
            batches=config.grad_accum,
            quantized=self._quantized_bytes(config.quantize),
        )

    def traffic(self, config: TrainingConfig) -> list[Collective]:
        """Return what the processes exchange in an optimizer step."""
        weights, _ = self._steps.weights(self._quantized_bytes(config.quantize))
        return step_traffic(weights, Sharding.of(config), batches=config.grad_accum)

    def speed_of_all(self, config: TrainingConfig, computing: float, card: Card) -> float:
        """Return the tokens a second of all processes, where no exchange overlaps with the computation.

        Args:
            config: The run's settings.
            computing: The seconds of a batch without any exchange.
            card: The GPU of each.
        """
        processes = Sharding.of(config).processes
        network = card.network(ETHERNET, devices=max(1, processes // config.nnodes))
        exchange = sum(network.seconds(collective, processes) for collective in self.traffic(config))
        tokens = full_batch(config).tokens * config.grad_accum
        return processes * tokens / (config.grad_accum * computing + exchange)

    def _quantized_bytes(self, scheme: Scheme | None) -> dict[str, int]:
        """Return the bytes of each quantized layer."""
        if scheme not in self._quantized:
            quantization = decide_quantization(self._model_config, scheme, self._dtype)
            self._quantized[scheme] = stored_bytes(self._model_config, quantization.config) if quantization else {}
        return self._quantized[scheme]


def _change(config: TrainingConfig, memory: _Memory, room: int) -> str | None:
    """Return the smallest change that makes a step fit into ``room`` bytes, as flags."""
    schemes = [config.quantize, *([Scheme.nf4] if memory.can_be_quantized(config) else [])]
    for other in _alternatives(config, schemes):
        if memory.of(other).total <= room:
            return _flags(config, other)
    return None


def _alternatives(config: TrainingConfig, schemes: Sequence[Scheme | None]) -> Iterator[TrainingConfig]:
    """Yield the settings, then others that need less memory, the cheapest first and shorter rows last."""
    halvings = [2**i for i in range(config.batch_size.bit_length()) if config.batch_size % 2**i == 0]
    lengths = [
        config.max_length // 2**i
        for i in range(8)
        if not i or config.max_length // 2**i >= max(SHORTEST, config.least_length)
    ]
    moments = {config.optimizer, "adamw8bit"} if config.method is Method.full else {config.optimizer}
    optimizers = sorted(moments, key=lambda name: name != config.optimizer)
    checkpointings = sorted({config.gradient_checkpointing, True})
    weights = [(config.strategy, scheme) for scheme in schemes]
    if Sharding.of(config).processes > 1 and config.strategy == "ddp" and config.quantize is None:
        weights.insert(1, ("fsdp", None))
    for length, (strategy, scheme), optimizer, checkpointing, parts in product(
        lengths, weights, optimizers, checkpointings, halvings
    ):
        yield config.model_copy(
            update={
                "max_length": length,
                "quantize": scheme,
                "optimizer": optimizer,
                "strategy": strategy,
                "gradient_checkpointing": checkpointing,
                "batch_size": config.batch_size // parts,
                "grad_accum": config.grad_accum * parts,
            }
        )


def _flags(config: TrainingConfig, other: TrainingConfig) -> str:
    """Return the flags that turn some settings into others."""
    names = ("batch_size", "grad_accum", "gradient_checkpointing", "strategy", "optimizer", "quantize", "max_length")
    changed = {name: getattr(other, name) for name in names if getattr(other, name) != getattr(config, name)}
    words = (f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}") for name, value in changed.items())
    return " ".join(words)


def _in_words(config: TrainingConfig) -> str:
    method = "every weight" if config.method is Method.full else f"{config.method.value} r{config.rank}"
    method += f" on {config.quantize}" if config.quantize else ""
    words = [config.verb.name, method, f"{config.batch_size} × {config.max_length:,} tokens", config.optimizer]
    return " · ".join([*words, "checkpointing"] if config.gradient_checkpointing else words)

"""What a run would take of memory and time: on the GPUs that people own, and on this machine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import nn

from hymba_tune.adapters import tokenizer_of, weights_of
from hymba_tune.checkpoint import choose_device, choose_dtype, choose_kernels, load_config
from hymba_tune.config import DistillConfig, Method, Scheme, TrainingConfig, as_mapping
from hymba_tune.data import open_sources, with_chat_template
from hymba_tune.data.checking import check_sources
from hymba_tune.errors import DataError
from hymba_tune.footprint import GPU_RESERVE, Footprint, StepMemory, device_memory, process_overhead
from hymba_tune.inputs import check_inputs
from hymba_tune.registry import ModelSource, resolve_model
from hymba_tune.schemes import stored_bytes, stored_quantization
from hymba_tune.train.memory_estimate import full_batch, step_settings
from hymba_tune.train.setup import check_quantization, lay_out, weights_quantization

CARDS = {
    8: ("RTX 4060", 30),
    12: ("RTX 4070", 58),
    16: ("RTX 4080", 97),
    24: ("RTX 4090", 165),
    48: ("L40S", 362),
    80: ("A100", 312),
}
"""GPUs that people own, by their GB: a name, and the TFLOP/s of bfloat16 products that its maker states."""
GPU_SHARE = 0.3
"""Share of these that a training step is taken to reach. An assumption: nothing has been measured on a GPU."""
STEP_OVER_PRODUCTS = {torch.float32: 1.9, torch.bfloat16: 2.9}
"""How many times as long as its matrix products alone a step takes on a CPU; measured, see benchmarks/train_step.py."""
SHORTEST = 256
"""Tokens below which no shorter rows are proposed."""


@dataclass(frozen=True)
class DeviceEstimate:
    """A run on one device.

    Attributes:
        device: Its name.
        has: Its bytes.
        needs: Bytes that the run takes there.
        tokens_per_s: That it may reach.
        nf4: Bytes that it takes with its weights quantized to NF4; None where they are not to be.
        change: Flags that make it fit; empty where it does, or None where none do.
        seconds: That the steps of the run may take, where its length is known.
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
    """How long a run is.

    Attributes:
        steps: Of the optimizer.
        tokens: That all of them read.
    """

    steps: int
    tokens: int


@dataclass(frozen=True)
class Plan:
    """What a run would take.

    Attributes:
        model: Its name.
        settings: What matters to memory, in words.
        tokens_per_step: At most, in an optimizer step of one device.
        dtype: The GPUs' number format.
        parts: Bytes on a GPU, by part.
        gpus: A verdict for each size.
        here: The verdict for this machine's own device.
        length: How long the run is, where --steps or --data say so.
    """

    model: str
    settings: str
    tokens_per_step: int
    dtype: str
    parts: Footprint
    gpus: list[DeviceEstimate]
    here: DeviceEstimate
    length: Length | None


def plan(config: TrainingConfig, progress: Callable[[int], None] | None = None) -> Plan:
    """Tell what a run takes whose rows are as long as --max-length lets them be: the most it can.

    Only the model's configuration is read; and the data, where some is named, for how long the run is.

    Args:
        config: Of the run.
        progress: Called with the number of rows read so far.

    Raises:
        HymbaTuneError: If the model, the device, the data or a setting cannot be used.
    """
    check_inputs(config, complete=False)
    device = choose_device(config.device)
    source = resolve_model(config.model)
    model_config = load_config(weights_of(source))
    own, foreign = choose_dtype(config.dtype, device), _gpu_dtype(config.dtype)
    choose_kernels(as_mapping(config.kernels), model_config, device, own)
    check_quantization(config, source, model_config)
    model = _lay_out(config, model_config, foreign)
    extra_bytes = _teacher(config, model_config, device)
    memory = _Memory(StepMemory(model, dtype=foreign, own_kernels=False), model_config, foreign, extra_bytes)
    parts, in_nf4 = memory.of(config), memory.in_nf4(config)
    flops = step_flops(model, checkpointing=config.gradient_checkpointing)
    gpus = []
    for size, (name, tflops) in CARDS.items():
        has, needs = size * 2**30, parts.total + GPU_RESERVE
        change = _change(config, memory, has - GPU_RESERVE)
        nf4 = None if in_nf4 is None else in_nf4 + GPU_RESERVE
        gpus.append(DeviceEstimate(f"{size} GB ({name})", has, needs, nf4, tflops * 1e12 * GPU_SHARE / flops, change))
    if own is not foreign or device.type != "cpu" or config.kernels:
        model = _lay_out(config, model_config, own)
        memory = _Memory(StepMemory(model, dtype=own, own_kernels=device.type == "cpu"), model_config, own, extra_bytes)
    here = _here(config, memory, device, own, flops, width=int(model_config.hidden_size))
    length = run_length(config, source, progress)
    return Plan(
        source.name,
        _in_words(config),
        full_batch(config).tokens * config.grad_accum,
        str(foreign).removeprefix("torch."),
        parts,
        [_timed(gpu, length) for gpu in gpus],
        _timed(here, length),
        length,
    )


def _teacher(config: TrainingConfig, student: Any, device: torch.device) -> int:
    """Bytes of a teacher beside the model, if there is one."""
    if not isinstance(config, DistillConfig):
        return 0
    from hymba_tune.distill.capture import plan_teacher  # takes a second to import, and is not always needed

    return plan_teacher(config, student, device)


def _timed(verdict: DeviceEstimate, length: Length | None) -> DeviceEstimate:
    return replace(verdict, seconds=length.tokens / verdict.tokens_per_s) if length else verdict


def run_length(
    config: TrainingConfig, source: ModelSource, progress: Callable[[int], None] | None = None
) -> Length | None:
    """Tell how long a run is: by its data; or by its steps, each as large as it can be; None where neither is given.

    Raises:
        DataError: If the data cannot be read, or holds nothing to train on.
    """
    step_rows = config.batch_size * config.grad_accum
    if not config.data:
        most = full_batch(config).tokens * config.grad_accum
        return Length(config.steps, config.steps * most) if config.steps else None
    rows, tokens = _rows_and_tokens(config, source, progress)
    if config.packing:
        rows = tokens / config.max_length
    steps = config.steps or math.ceil(config.epochs * rows / step_rows)
    read = config.epochs * tokens if config.steps is None else steps * min(step_rows, rows) * tokens / rows
    return Length(steps, round(read))


def _rows_and_tokens(
    config: TrainingConfig, source: ModelSource, progress: Callable[[int], None] | None
) -> tuple[float, float]:
    """Of a pass over the data, without what is held out."""
    sources = open_sources(config.data, config.weights, config.caps)
    tokenizer = with_chat_template(tokenizer_of(source), config.chat_template)
    rows = tokens = 0.0
    for one in sources:
        found = check_sources(
            [one],
            tokenizer,
            max_length=config.max_length,
            mapping=as_mapping(config.map),
            learn=config.learn,
            progress=progress,
        )
        if problem := found.files[0].problem:
            raise problem
        times = max(1.0, one.weight)  # of smaller weights the rows were drawn as they were read
        rows += times * (found.rows - found.bad_rows - found.too_long)
        tokens += times * found.tokens
    if not rows:
        names = ", ".join(config.data)
        raise DataError(f"Nothing to train on in {names}.", fix=f"hymba-tune data check {names}")
    apart = bool(config.eval_data) or any(one.held_out for one in sources)
    kept = 1.0 if apart else 1 - config.eval_split
    return kept * rows, kept * tokens


def _lay_out(config: TrainingConfig, model_config: Any, dtype: torch.dtype) -> Any:
    return lay_out(config, model_config, torch.float32 if config.method is Method.full else dtype)


def _gpu_dtype(name: str) -> torch.dtype:
    """Every GPU of `CARDS` computes in bfloat16."""
    dtype: torch.dtype = torch.bfloat16 if name == "auto" else getattr(torch, name)
    return dtype


def _here(
    config: TrainingConfig, memory: _Memory, device: torch.device, dtype: torch.dtype, flops: float, *, width: int
) -> DeviceEstimate:
    extra_bytes, has = process_overhead(device, dtype), device_memory(device)
    needs, in_nf4 = memory.of(config).total + extra_bytes, memory.in_nf4(config)
    slower = STEP_OVER_PRODUCTS.get(dtype, 1.9) if device.type == "cpu" else 1 / GPU_SHARE
    speed = _product_rate(width, device, dtype) / slower / flops
    nf4 = None if in_nf4 is None else in_nf4 + extra_bytes
    return DeviceEstimate(
        f"{has / 2**30:.0f} GB (here: {device})", has, needs, nf4, speed, _change(config, memory, has - extra_bytes)
    )


def step_flops(model: Any, *, checkpointing: bool) -> float:
    """Floating-point operations of the linear layers for a token of a training step.

    Two for each weight in the forward, two for the gradient of the inputs, two for that of a weight that is trained;
    two more where the forward is computed again.
    """
    linear = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    passes = 6 if checkpointing else 4
    return float(sum(weight.numel() * (passes + 2 * weight.requires_grad) for weight in linear))


def _product_rate(width: int, device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Operations a second that this device reaches in a product such as the model's, measured now."""
    x, weight = (torch.randn(shape, dtype=dtype, device=device) for shape in ((512, width), (width, 4 * width)))
    done, started = -1, 0.0
    while done < 1 or time.perf_counter() - started < seconds:
        if done == 0:
            started = time.perf_counter()  # the first product only warms up
        (x @ weight).sum().item()
        done += 1
    return 2 * done * x.numel() * weight.shape[1] / (time.perf_counter() - started)


class _Memory:
    """Tells what a model's steps take with any settings; what is not quantized is counted once."""

    def __init__(self, steps: StepMemory, model_config: Any, dtype: torch.dtype, extra_bytes: int) -> None:
        self._steps, self._model_config, self._dtype, self._beside = steps, model_config, dtype, extra_bytes
        self._quantized: dict[Scheme | None, dict[str, int]] = {}

    def of(self, config: TrainingConfig) -> Footprint:
        """The worst moment of a step."""
        if config.quantize not in self._quantized:
            quantization = weights_quantization(config, self._model_config, self._dtype)
            self._quantized[config.quantize] = stored_bytes(self._model_config, quantization) if quantization else {}
        step = self._steps.of(full_batch(config), **step_settings(config), quantized=self._quantized[config.quantize])
        return replace(step, extra_bytes=self._beside)

    def in_nf4(self, config: TrainingConfig) -> int | None:
        """Bytes of a step on weights in NF4; None where it trains on quantized ones already, or trains them."""
        if not self.may_be_quantized(config):
            return None
        return self.of(config.model_copy(update={"quantize": Scheme.nf4})).total

    def may_be_quantized(self, config: TrainingConfig) -> bool:
        """Whether the weights are whole and not trained."""
        whole = stored_quantization(self._model_config) is None and config.quantize is None
        return whole and config.method is not Method.full


def _change(config: TrainingConfig, memory: _Memory, room: int) -> str | None:
    """The least that has to change for a step to fit into some bytes, as flags."""
    schemes = [config.quantize, *([Scheme.nf4] if memory.may_be_quantized(config) else [])]
    for other in _alternatives(config, schemes):
        if memory.of(other).total <= room:
            return _flags(config, other)
    return None


def _alternatives(config: TrainingConfig, schemes: Sequence[Scheme | None]) -> Iterator[TrainingConfig]:
    """The settings, then others that take less, those first that cost least: shorter rows last of all."""
    halvings = [2**i for i in range(config.batch_size.bit_length()) if config.batch_size % 2**i == 0]
    lengths = [config.max_length // 2**i for i in range(8) if not i or config.max_length // 2**i >= SHORTEST]
    moments = {config.optimizer, "adamw8bit"} if config.method is Method.full else {config.optimizer}
    optimizers = sorted(moments, key=lambda name: name != config.optimizer)
    checkpointings = sorted({config.gradient_checkpointing, True})
    for length, scheme, optimizer, checkpointing, parts in product(
        lengths, schemes, optimizers, checkpointings, halvings
    ):
        yield config.model_copy(
            update={
                "max_length": length,
                "quantize": scheme,
                "optimizer": optimizer,
                "gradient_checkpointing": checkpointing,
                "batch_size": config.batch_size // parts,
                "grad_accum": config.grad_accum * parts,
            }
        )


def _flags(config: TrainingConfig, other: TrainingConfig) -> str:
    """What is to be typed to get from some settings to others."""
    names = ("batch_size", "grad_accum", "gradient_checkpointing", "optimizer", "quantize", "max_length")
    changed = {name: getattr(other, name) for name in names if getattr(other, name) != getattr(config, name)}
    words = (f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}") for name, value in changed.items())
    return " ".join(words)


def _in_words(config: TrainingConfig) -> str:
    method = "every weight" if config.method is Method.full else f"{config.method.value} r{config.rank}"
    method += f" on {config.quantize}" if config.quantize else ""
    words = [config.verb.name, method, f"{config.batch_size} × {config.max_length:,} tokens", config.optimizer]
    return " · ".join([*words, "checkpointing"] if config.gradient_checkpointing else words)

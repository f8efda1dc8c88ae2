"""The memory that a run will need, estimated from its settings and its data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc

from hymba_tune.config import GRPOConfig, TrainingConfig
from hymba_tune.footprint import Batch, Footprint, Sharding, StepMemory, device_memory, process_overhead
from hymba_tune.generate.batches import sizes
from hymba_tune.schemes import stored_bytes
from hymba_tune.train.setup import Data, Setup, lay_out

MOST_DRAWN = 2**22
"""The most rows that batches are drawn from: more of them would hardly hold a larger batch."""
READ = 1_000
"""Rows read at a time."""


@dataclass(frozen=True)
class MemoryEstimate:
    """The memory that a run will need at its peak.

    Attributes:
        step: The memory of a training step.
        extra_bytes: The bytes of the process without the step's tensors, or a GPU's reserve.
        has: The bytes of the device.
        on_gpu: Whether the device is a GPU.
    """

    step: Footprint
    extra_bytes: int
    has: int
    on_gpu: bool

    @property
    def peak(self) -> int:
        """The bytes that `peak_memory` is expected to measure: PyTorch's tensors on a GPU, else the whole process."""
        return self.step.total if self.on_gpu else self.needs

    @property
    def needs(self) -> int:
        """All bytes that the run needs."""
        return self.step.total + self.extra_bytes

    @property
    def fits(self) -> bool:
        """Whether the device has that much."""
        return self.needs <= self.has


def estimate_memory(setup: Setup, data: Data, extra_bytes: int = 0) -> MemoryEstimate:
    """Estimate the memory of a run before its weights are loaded.

    Args:
        setup: The run's setup.
        data: The rows that it trains on.
        extra_bytes: The bytes that this kind of training holds in addition to the model.
    """
    config, device = setup.config, setup.device
    memory = StepMemory(
        lay_out(config, setup.model_config, setup.weights_dtype, setup.added_tokens),
        dtype=setup.dtype,
        own_kernels=device.type == "cpu",
    )
    quantized = stored_bytes(setup.model_config, setup.quantization.config) if setup.quantization else {}
    step = memory.of(largest_batch(config, data), **step_settings(config, data), quantized=quantized)
    return MemoryEstimate(
        replace(step, extra_bytes=extra_bytes),
        process_overhead(device, setup.dtype),
        device_memory(device),
        device.type == "cuda",
    )


def bytes_needed_with(setup: Setup, data: Data, extra_bytes: int, config: TrainingConfig) -> int:
    """Estimate the bytes that a run would need on the same data with other settings."""
    return estimate_memory(replace(setup, config=config), data, extra_bytes).needs


def step_settings(config: TrainingConfig, data: Data | None = None) -> dict[str, Any]:
    """Return the arguments of `StepMemory.of` that follow from the settings, and from the data where it is read."""
    rollouts = None
    if isinstance(config, GRPOConfig):
        rollouts = config.answers_at_a_time, _longest_answered(config, data) if data else config.max_length
        rollouts = sizes(*rollouts) if config.cuda_graphs else rollouts
    return {
        "rollouts": rollouts,
        "checkpointing": config.gradient_checkpointing,
        "accumulates": config.grad_accum > 1,
        "optimizer": config.optimizer,
        "logit_copies": config.verb.logit_copies,
        "sharding": Sharding.of(config),
    }


def full_batch(config: TrainingConfig) -> Batch:
    """Return the batch of a run whose rows all have the maximum length."""
    return Batch.full(config.batch_size * config.verb.texts_per_row, config.max_length)


def largest_batch(config: TrainingConfig, data: Data) -> Batch:
    """Return the largest batch that a run is likely to draw from its data."""
    if isinstance(config, GRPOConfig):
        most = Batch.full(config.batch_size, _longest_answered(config, data))
        return replace(most, learned=config.batch_size * config.max_new_tokens)
    share = data.report.learned / max(1, data.report.tokens)
    if getattr(config, "packing", False):
        full = full_batch(config)
        return Batch(full.tokens, min(full.longest, data.report.longest), round(full.tokens * share), full.places)
    lengths = text_lengths(data.train).clip(max=config.max_length)  # may be shorter than the rows were cut to
    rows = _drawn(len(lengths), config)
    sums = lengths.sum(1)[rows].sum(1)
    batch = lengths[rows[int(sums.argmax())]]
    tokens, longest = int(batch.sum()), int(batch.max())
    return Batch(tokens, longest, max(1, round(tokens * share)), batch.size * longest)


def _longest_answered(config: GRPOConfig, data: Data) -> int:
    """Return the most tokens of a prompt with an answer."""
    return min(config.max_length, data.report.longest + config.max_new_tokens)


def _drawn(count: int, config: TrainingConfig) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return row numbers ``(batches, batch size)``, drawn at random, as many as a run draws."""
    generator = np.random.default_rng(0)
    size = min(config.batch_size, count)
    wanted = config.steps * config.grad_accum * size if config.steps else round((config.epochs or 1) * count)
    wanted = max(size, min(wanted, MOST_DRAWN))
    epochs = [generator.permutation(count) for _ in range(-(-wanted // count))]
    drawn = np.concatenate(epochs)[:wanted]
    return drawn[: len(drawn) // size * size].reshape(-1, size)


def text_lengths(rows: datasets.Dataset) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return the tokens ``(rows, texts of a row)`` of encoded rows: of one text, or of a prompt with each answer."""
    names = [name for name in rows.column_names if name.endswith("_ids")]
    tables = rows.select_columns(names).with_format("arrow").iter(READ)  # a whole table would be copied to memory
    parts = [np.stack([pc.list_value_length(table[name]) for name in names], 1) for table in tables]
    lengths = dict(zip(names, np.concatenate(parts).T.astype(np.int64), strict=True))
    prompt = lengths.pop("prompt_ids", 0)
    return np.stack([answers + prompt for answers in lengths.values()], 1)

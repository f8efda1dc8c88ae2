"""What a machine runs out of: disk space, foreseen before a run and survived within it, and memory."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from hymba_tune.config import Method, TrainingConfig
from hymba_tune.errors import ConfigError, TrainingError
from hymba_tune.footprint import MOMENT_BYTES
from hymba_tune.train.checkpoints import forget_torn
from hymba_tune.train.memory import peak_memory
from hymba_tune.train.run import Run

SMALL_FILES = 2**23
"""Bytes of a tokenizer and of what a trainer keeps beside weights and moments, generously."""
WRITING_FAILED = ("os error 28", "inline_container", "iostream error", "PytorchStreamWriter")
"""What safetensors and torch say when a file cannot be written to its end."""
GB = 2**30


def kept_checkpoints(config: TrainingConfig) -> int:
    """Checkpoints that a run keeps: the last two, as one may be torn, and the best."""
    return 3 if config.keeps_best else 2


def disk_needed(config: TrainingConfig, *, trained: int, total: int) -> int:
    """Bytes a run writes at most at a time: its checkpoints, the one being written among them, and its result.

    Args:
        config: Of the run.
        trained: Parameters that are trained; they and their moments are in float32.
        total: All parameters.
    """
    checkpoint = trained * (4 + MOMENT_BYTES[config.optimizer]) + SMALL_FILES
    result = 4 * (total if config.method is Method.full else trained) + SMALL_FILES
    return round((kept_checkpoints(config) + 1) * checkpoint + result)


def check_disk(run: Run, needed: int) -> None:
    """See that a run has the space it needs, less what its checkpoints take already.

    Raises:
        ConfigError: If it has not.
    """
    held = sum(path.stat().st_size for path in run.checkpoints.rglob("*") if path.is_file())
    free, missing = _free(run.path), needed - held - _free(run.path)
    if missing > 0:
        raise ConfigError(
            f"--out {run.path}: its disk has {_size(free)} free.",
            expected=f"{_size(needed - held)} for checkpoints and what is trained",
            fix=f"free {_size(missing)}, or --out on another disk, or train less: a lower --rank, or "
            "--optimizer adamw8bit",
        )


@contextmanager
def limits_explained(run: Run, config: TrainingConfig, device: torch.device) -> Iterator[None]:
    """Turn what libraries raise when memory or disk runs out into what to do about it.

    Raises:
        TrainingError: Instead of theirs.
    """
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise _out_of_memory(config, device) from error
        if is_disk_full(error, run.path):
            forget_torn(run.checkpoints)
            raise _disk_full(run) from error
        raise


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out, of a GPU or of this machine."""
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error))


def is_disk_full(error: Exception, path: Path) -> bool:
    """Whether an error says that a file could not be written for want of space; torch does not say for want of what."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    said = str(error)
    return "os error 28" in said or (any(words in said for words in WRITING_FAILED) and _free(path) < GB)


def memory_advice(config: TrainingConfig) -> list[str]:
    """What to lower, and to what, the cheapest first."""
    advice = []
    if config.batch_size > 1:
        half, steps = config.batch_size // 2, config.grad_accum * 2
        advice.append(f"--batch-size {half} --grad-accum {steps} (the same steps with half the activations)")
    if not config.gradient_checkpointing:
        advice.append("--gradient-checkpointing (keeps a small share of the activations, for a third more time)")
    advice.append(f"--max-length {max(8, config.max_length // 2)}")
    if config.method is Method.full:
        advice.append("--method lora" if "8bit" in config.optimizer else "--optimizer adamw8bit, or --method lora")
    return advice


def _out_of_memory(config: TrainingConfig, device: torch.device) -> TrainingError:
    peak, has = peak_memory(device) / GB, ""
    if device.type == "cuda":
        has = f", of {torch.cuda.get_device_properties(device).total_memory / GB:.1f} GB"
    return TrainingError(
        f"Out of memory on {device}: the run had taken {peak:.1f} GB{has}.",
        expected=f"room for {config.batch_size} × {config.max_length:,} tokens at a time",
        fix="\n             ".join(memory_advice(config)),
    )


def _disk_full(run: Run) -> TrainingError:
    checkpoint = run.newest_checkpoint()
    return TrainingError(
        f"The disk of {run.path} is full.",
        expected="room for the checkpoint at hand; nothing half-written was kept",
        fix=f"free some space, then --resume {run.path} (from {checkpoint.name})" if checkpoint else "free some space",
    )


def _size(size: int) -> str:
    return f"{size / GB:.1f} GB" if size >= GB else f"{size / 2**20:.0f} MB"


def _free(path: Path) -> int:
    """Bytes free on the disk of a folder that need not exist yet."""
    return shutil.disk_usage(next(folder for folder in [path, *path.absolute().parents] if folder.exists())).free

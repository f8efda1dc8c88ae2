"""Limits of the machine: disk space, checked before a run and handled within it, memory, and kernels that fail."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb
from typing import Any

import torch

from hymba_tune.config import GRPOConfig, Method, Scheme, TrainingConfig
from hymba_tune.distributed.environment import is_main
from hymba_tune.errors import ConfigError, TrainingError
from hymba_tune.files.checkpoints import forget_torn
from hymba_tune.footprint import MOMENT_BYTES, Sharding
from hymba_tune.formatting import format_bytes
from hymba_tune.memory import peak_memory
from hymba_tune.model.backends import OPERATIONS, Backend
from hymba_tune.model.self_test import first_line
from hymba_tune.train.run import Run

SMALL_FILES = 2**23
"""An upper bound on the bytes of a tokenizer and of a trainer's state without weights and moments."""
WRITING_FAILED = ("os error 28", "inline_container", "iostream error", "PytorchStreamWriter")
"""Parts of the error messages of safetensors and torch when a file cannot be written completely."""
ZERO_COPIES = 3
"""Copies of the trained weights in a checkpoint of DeepSpeed's ZeRO: the result, its module and its optimizer's."""
DEVICE_ERRORS = ("CUDA error", "HIP error", "Triton Error")
"""Parts of the messages of errors of a GPU, from whichever library."""
COMPILERS = ("torch._dynamo", "torch._functorch", "torch._inductor")
"""The packages through which `torch.compile` runs a backward."""
GB = 2**30


def kept_checkpoints(config: TrainingConfig) -> int:
    """Return how many checkpoints a run keeps: the last two, as one may be incomplete, and the best."""
    return 3 if config.keeps_best else 2


def disk_needed(config: TrainingConfig, *, trained: int, total: int) -> int:
    """Return the most disk space that a run needs at a time: its checkpoints, one more being written, and its result.

    Args:
        config: The run's settings.
        trained: The number of trained parameters; they and their moments are in float32. Shares of several processes
            add up to the whole.
        total: The number of all parameters.
    """
    copies = ZERO_COPIES if config.strategy.startswith("zero") else 1
    checkpoint = trained * (4 * copies + MOMENT_BYTES[config.optimizer]) + SMALL_FILES
    result = 4 * (total if config.method is Method.full else trained) + SMALL_FILES
    return round((kept_checkpoints(config) + 1) * checkpoint + result)


def check_disk(run: Run, needed: int) -> None:
    """Check that a run has the disk space it needs, without what its checkpoints take already.

    Raises:
        ConfigError: If it does not.
    """
    held = sum(path.stat().st_size for path in run.checkpoints.rglob("*") if path.is_file())
    free = _free(run.path)
    missing = needed - held - free
    if missing > 0:
        raise ConfigError(
            f"--out {run.path}: its disk has {format_bytes(free)} free.",
            expected=f"{format_bytes(needed - held)} for the checkpoints and the trained weights",
            fix=f"free {format_bytes(missing)}, or --out on another disk, or train less: a lower --rank, or "
            "--optimizer adamw8bit",
        )


@contextmanager
def limits_explained(
    run: Run, config: TrainingConfig, device: torch.device, needs: Callable[[TrainingConfig], int] | None = None
) -> Iterator[None]:
    """Replace the errors of libraries when memory or disk runs out or a kernel fails by messages with what to change.

    Args:
        run: The run, for the disk it writes to.
        config: The run's settings.
        device: The device of the run.
        needs: Estimates the bytes that the run would need with other settings; None if they cannot be estimated.

    Raises:
        TrainingError: If memory or disk ran out, or a kernel failed.
    """
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise _out_of_memory(config, device, needs) from error
        if is_disk_full(error, run.path):
            if is_main():
                forget_torn(run.checkpoints)
            raise _disk_full(run) from error
        if blamed := blamed_kernels(error):
            raise _kernel_failed(run, device, error, blamed) from error
        raise


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error means that a GPU or this machine is out of memory."""
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error))


def is_disk_full(error: Exception, path: Path) -> bool:
    """Return whether an error means that the disk is full. Torch's message does not name the cause."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    message = str(error)
    return "os error 28" in message or (any(words in message for words in WRITING_FAILED) and _free(path) < GB)


def blamed_kernels(error: Exception) -> dict[str, tuple[str, str]]:
    """Return for each operation whose kernel an error may come from that kernel, and a plain one to use instead.

    These are the compiled or foreign kernels that training uses, if the error passed through their modules, or through
    `torch.compile` where that compiled them. An error of the device may come from any of them, since kernels run while
    Python goes on.
    """
    modules = {frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__)}
    of_device = any(words in str(error) for words in DEVICE_ERRORS)
    of_compiler = any(module.startswith(COMPILERS) for module in modules)
    return {
        name: (backend.name, operation.plain)
        for name, operation in OPERATIONS.items()
        for backend in operation.tested
        if of_device or modules.intersection(_modules(backend)) or (backend.slow_start and of_compiler)
    }


def _modules(backend: Backend) -> list[str]:
    """Return the names of the modules of a backend's functions."""
    functions = backend.run if isinstance(backend.run, tuple) else (backend.run,)
    return [function.__module__ for function in functions]


def memory_advice(config: TrainingConfig, needs: Callable[[TrainingConfig], int] | None = None) -> list[str]:
    """Return the settings to change, the cheapest first.

    Args:
        config: The run's settings.
        needs: Estimates the bytes that the run would need with other settings. Where given, each change is listed with
            its estimate, and changes that save nothing are left out.
    """
    advice = []
    now = needs(config) if needs else 0
    for changes, why in _savings(config):
        reasons = [why]
        if needs is not None:
            then = needs(config.model_copy(update=changes))
            if then >= now:
                continue
            reasons = [f"about {format_bytes(then)} instead of {format_bytes(now)}", why]
        words = [_flag(name, value) for name, value in changes.items()]
        advice.append(f"{' '.join(words)} ({', '.join(reasons)})")
    return advice


def _savings(config: TrainingConfig) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield settings that need less memory, and what they cost."""
    if config.batch_size > 1:
        halved = {"batch_size": config.batch_size // 2, "grad_accum": config.grad_accum * 2}
        yield halved, "the same steps"
    if not config.gradient_checkpointing:
        yield {"gradient_checkpointing": True}, "a third more time"
    if Sharding.of(config).processes > 1 and config.strategy == "ddp" and config.quantize is None:
        yield {"strategy": "fsdp"}, "weights, gradients and optimizer divided among the processes"
    if config.strategy.startswith("zero") and config.offload is None:
        yield {"offload": "optimizer"}, "its states in CPU memory, slower"
    if config.method is not Method.full and config.quantize is None and not config.strategy.startswith("zero"):
        yield {"quantize": Scheme.nf4}, "the base weights in 4 bits"
    if isinstance(config, GRPOConfig) and config.answers_at_a_time > 1:
        yield {"rollout_batch": config.answers_at_a_time // 2}, "the same answers, sampled more slowly"
    yield {"max_length": max(config.least_length, config.max_length // 2)}, "longer rows are cut"
    if config.method is Method.full:
        if "8bit" not in config.optimizer:
            yield {"optimizer": "adamw8bit"}, "nearly the same steps"
        yield {"method": Method.lora}, "an adapter instead of all weights"


def _flag(name: str, value: Any) -> str:
    flag = f"--{name.replace('_', '-')}"
    return flag if value is True else f"{flag} {value}"


def _out_of_memory(
    config: TrainingConfig, device: torch.device, needs: Callable[[TrainingConfig], int] | None
) -> TrainingError:
    peak = format_bytes(peak_memory(device))
    has = ""
    if device.type == "cuda":
        has = f", of {format_bytes(torch.cuda.get_device_properties(device).total_memory)}"
    return TrainingError(
        f"Out of memory on {device}: the run had used {peak}{has}.",
        expected=f"room for {config.batch_size} × {config.max_length:,} tokens at a time",
        fix="\n             ".join(memory_advice(config, needs)),
    )


def _disk_full(run: Run) -> TrainingError:
    checkpoint = run.newest_checkpoint()
    return TrainingError(
        f"The disk of {run.path} is full.",
        expected="room for one more checkpoint; the incomplete one was removed",
        fix=f"free some space, then --resume {run.path} (from {checkpoint.name})" if checkpoint else "free some space",
    )


def _kernel_failed(
    run: Run, device: torch.device, error: Exception, blamed: dict[str, tuple[str, str]]
) -> TrainingError:
    what = " or ".join(f"{name} kernel {kernel}" for name, (kernel, _) in blamed.items())
    others = " ".join(f"{name}={plain}" for name, (_, plain) in blamed.items())
    resume = f"--resume {run.path} " if run.newest_checkpoint() else ""
    several = "" if len(blamed) == 1 else "; with CUDA_LAUNCH_BLOCKING=1 in the environment this message names one"
    return TrainingError(
        f"The {what} failed on {device}: {type(error).__name__}: {first_line(error)}",
        expected="a kernel that computes what it computed in its self-test",
        fix=f"{resume}--kernels {others}, which is slower{several}",
    )


def _free(path: Path) -> int:
    """Return the free bytes on the disk of a folder that need not exist yet."""
    return shutil.disk_usage(next(folder for folder in [path, *path.absolute().parents] if folder.exists())).free

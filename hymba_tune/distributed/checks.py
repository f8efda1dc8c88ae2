"""Checks of the settings of several processes, before anything that is slow to import is imported."""

from __future__ import annotations

import os
import sys
from importlib import metadata

from hymba_tune.config import DistributedOptions, LaunchOptions
from hymba_tune.distributed.compilation import check_compilation
from hymba_tune.distributed.devices import count_cores, count_gpus
from hymba_tune.distributed.environment import check_single_process, world_size
from hymba_tune.errors import ConfigError

DEEPSPEED = (0, 19, 8)
"""The first version of DeepSpeed with which ZeRO-3 trains an adapter with gradient checkpointing."""
GIVEN = ("RANK", "MASTER_ADDR", "MASTER_PORT")
"""Variables that a launcher sets beside WORLD_SIZE."""


def is_started() -> bool:
    """Return whether a launcher has started this process, this command's own or another."""
    return bool(os.environ.get("WORLD_SIZE"))


def count_processes(options: LaunchOptions, device: str, verb: str) -> int:
    """Check how a command is to run in several processes.

    Args:
        options: The settings.
        device: The value of ``--device``.
        verb: The command, for messages.

    Returns:
        The number of processes that work together, on all machines.

    Raises:
        ConfigError: If this machine cannot start them, lacks a package, or a launcher has not said enough.
    """
    if is_started():
        _check_started()
        processes = world_size()
    else:
        check_single_process(verb)  # MPI alone does not say where the processes meet
        processes = processes_here(options.nproc, device) * options.nnodes
    if ":" in device and processes > 1:
        raise ConfigError(
            f"--device {device} is one GPU, and {processes} processes need one each.",
            fix="--device cuda; CUDA_VISIBLE_DEVICES chooses among the GPUs",
        )
    if isinstance(options, DistributedOptions):
        check_strategy(options)
    return processes


def _check_started() -> None:
    size = os.environ["WORLD_SIZE"]
    if not size.isdecimal() or int(size) < 1:
        raise ConfigError(f"WORLD_SIZE is {size!r}.", expected="the number of processes")
    if int(size) > 1 and (missing := [name for name in GIVEN if not os.environ.get(name)]):
        raise ConfigError(
            f"WORLD_SIZE is {size}, and {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set.",
            expected="a launcher that sets all of WORLD_SIZE, RANK, LOCAL_RANK, MASTER_ADDR and MASTER_PORT",
            fix="unset WORLD_SIZE and use --nproc, or start it with torchrun",
        )


def processes_here(nproc: str, device: str) -> int:
    """Return the number of processes on this machine.

    Args:
        nproc: The value of ``--nproc``.
        device: The value of ``--device``.

    Raises:
        ConfigError: If there are fewer devices.
    """
    gpus = 0 if device == "cpu" else count_gpus()
    if nproc == "auto":
        return gpus if gpus and sys.platform != "win32" else 1
    if int(nproc) > (limit := gpus or count_cores()) and int(nproc) > 1:
        have = f"{gpus} GPU{'s' * (gpus > 1)}" if gpus else f"no GPU, and {limit} CPU core{'s' * (limit > 1)}"
        raise ConfigError(
            f"--nproc {nproc}: this machine has {have}.",
            expected=f"at most {limit}",
            fix="--nproc auto" + ("" if gpus else "; hymba-tune doctor shows why a GPU is not found"),
        )
    return int(nproc)


def check_strategy(options: DistributedOptions) -> None:
    """Check that what the strategy needs is installed and will not hang.

    Raises:
        ConfigError: If a package is missing or too old, or a killed compilation has left a lock.
    """
    if not options.strategy.startswith("zero"):
        return
    least = ".".join(map(str, DEEPSPEED))
    try:
        version = metadata.version("deepspeed")
    except metadata.PackageNotFoundError:
        raise ConfigError(
            f"--strategy {options.strategy} needs DeepSpeed, which is not installed.",
            fix="pip install 'hymba-tune[deepspeed]', or --strategy fsdp",
        ) from None
    numbers = tuple(int("".join(filter(str.isdecimal, part)) or 0) for part in version.split("+")[0].split(".")[:3])
    if numbers < DEEPSPEED:
        raise ConfigError(
            f"--strategy {options.strategy} needs DeepSpeed {least} or newer, and {version} is installed.",
            fix=f"pip install 'deepspeed>={least}'",
        )
    check_compilation(alone=options.nnodes == 1 and not is_started())


def accumulation(global_batch: int, batch_size: int, processes: int) -> int:
    """Return the batches in an optimizer step of each process.

    Args:
        global_batch: Rows in a step over all processes.
        batch_size: Rows in a batch of a process.
        processes: The number of processes.

    Raises:
        ConfigError: If the rows cannot be divided among the processes.
    """
    batches, rest = divmod(global_batch, batch_size)
    if rest:
        divisors = [size for size in range(1, min(global_batch, batch_size) + 1) if global_batch % size == 0]
        raise ConfigError(
            f"--global-batch {global_batch} is not a multiple of --batch-size {batch_size}.",
            expected=f"--batch-size {_listed(divisors)}",
        )
    if batches % processes:
        fitting = [number for number in range(1, batches + 1) if batches % number == 0]
        smaller = next((size for size in range(batch_size, 0, -1) if global_batch % (size * processes) == 0), None)
        raise ConfigError(
            f"--global-batch {global_batch} is {'1 batch' if batches == 1 else f'{batches} batches'} of {batch_size} "
            f"rows, which {processes} processes cannot share evenly.",
            expected=f"{_listed(fitting)} process{'es' if batches > 1 else ''} in all (--nproc), or a --global-batch "
            f"that is a multiple of {batch_size * processes}",
            fix=f"--batch-size {smaller}" if smaller else "",
        )
    return batches // processes


def divide_step(global_batch: int, processes: int, batch_size: int) -> tuple[int, int]:
    """Divide the rows of a step, which do not change when a run is resumed, among another number of processes.

    Args:
        global_batch: Rows in a step over all processes.
        processes: The number of processes.
        batch_size: The most rows in a batch of a process.

    Returns:
        The rows in a batch of a process, and its batches in a step.

    Raises:
        ConfigError: If the processes cannot share the rows evenly; it names the numbers that can.
    """
    rows, rest = divmod(global_batch, processes)
    if rest:
        fitting = [number for number in range(1, global_batch + 1) if global_batch % number == 0]
        raise ConfigError(
            f"The run takes {global_batch} rows a step, which {processes} processes cannot share evenly.",
            expected=f"{_listed(fitting)} processes in all (--nproc)",
        )
    size = max(size for size in range(1, min(batch_size, rows) + 1) if rows % size == 0)
    return size, rows // size


def _listed(numbers: list[int]) -> str:
    """Return at most a dozen numbers, from both ends."""
    shown = [str(number) for number in numbers]
    if len(shown) > 12:
        shown = [*shown[:6], "…", *shown[-6:]]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} or {shown[-1]}"

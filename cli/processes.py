"""Commands that run in several processes: this one starts them, or is one of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar

from hymba_tune.cli.screen import error_console
from hymba_tune.config import LaunchOptions, TrainingConfig
from hymba_tune.distributed import watch
from hymba_tune.distributed.accelerate_file import with_accelerate_config
from hymba_tune.distributed.checks import accumulation, check_strategy, count_processes, is_started
from hymba_tune.distributed.launch import launch, restarts, settings_of_parent
from hymba_tune.errors import ConfigError
from hymba_tune.train.resuming import for_processes

C = TypeVar("C", bound=TrainingConfig)
L = TypeVar("L", bound=LaunchOptions)


def settings_if_worker(flags: L) -> L | None:
    """Return the settings with which the first process has started this one, and begin to watch the others.

    Returns:
        The settings; None in the first process, and under another launcher.
    """
    settings = settings_of_parent()
    if settings is None:
        return None
    assert isinstance(settings, type(flags))
    watch.start()
    return settings


def train_in_processes(settings: C) -> C:
    """Return the settings of a run for its number of processes, or start these.

    Raises:
        HymbaTuneError: If this machine cannot start the processes, or one of them has ended by an error.
        SystemExit: If other processes have done the work.
    """
    verb = settings.verb.name
    processes = count_processes(settings, settings.device, verb)
    if settings.accelerate_config is not None:
        _quiet_torch()
        settings = with_accelerate_config(settings)
        processes = count_processes(settings, settings.device, verb)
    if settings.resume is not None:
        settings = for_processes(settings, processes)
    elif settings.global_batch is not None:
        grad_accum = accumulation(settings.global_batch, settings.batch_size, processes)
        settings = settings.model_copy(update={"grad_accum": grad_accum})
    if processes > 1:
        _quiet_torch()
    if is_started() or (processes == 1 and settings.strategy == "ddp" and not settings.max_restarts):
        return settings
    if settings.nnodes > 1 and settings.out is None and settings.resume is None:
        raise ConfigError(
            f"--nnodes {settings.nnodes} needs --out: each machine would choose a name of its own.",
            fix="--out DIR, the same on each machine",
        )
    from hymba_tune.train.run import Run

    run = Run(settings.resume) if settings.resume else Run.choose(settings)
    if settings.resume is None:
        settings = settings.model_copy(update={"out": run.path})
    launch(verb, settings, processes // settings.nnodes, run=run.path)
    raise SystemExit(0)


def capture_in_processes(verb: str, settings: LaunchOptions, device: str) -> None:
    """Start the processes of a command that writes no run, if there are to be several.

    Raises:
        HymbaTuneError: If this machine cannot start the processes, or one of them has ended by an error.
        SystemExit: If other processes have done the work.
    """
    processes = count_processes(settings, device, verb)
    if processes > 1:
        _quiet_torch()
    if not is_started() and processes > 1:
        launch(verb, settings, processes // settings.nnodes)
        raise SystemExit(0)


def _quiet_torch() -> None:
    """Leave the messages about connections to this package; torch reads the variable when it is imported."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")


def if_restarted(settings: C) -> C:
    """Return the settings with which a run goes on, if one of its processes has died.

    Raises:
        ConfigError: If the dead process has left a lock.
    """
    if not restarts():
        return settings
    from hymba_tune.train.run import Run

    check_strategy(settings)
    run = Run(settings.resume or settings.out or Path())
    checkpoint = run.newest_checkpoint()
    where = "from the start" if checkpoint is None else f"from {checkpoint}"
    error_console.print(
        f" a process has died; restart {restarts()} of {settings.max_restarts}, {where}", markup=False, soft_wrap=True
    )
    if settings.resume is not None:
        return settings
    if checkpoint is not None:
        saved = run.read_config()  # with the defaults that the run has chosen by the size of the model
        chosen = {"lr": saved.lr, "epochs": saved.epochs}
        return settings.model_copy(update={"resume": settings.out, "out": None, **chosen})
    return settings.model_copy(update={"overwrite": True})  # what the first try has left

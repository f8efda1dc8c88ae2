"""The settings of a resumed run. This module does not import torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from hymba_tune.config import LaunchOptions, PreferenceConfig, TrainingConfig
from hymba_tune.distributed.checks import divide_step
from hymba_tune.errors import ConfigError, command
from hymba_tune.train.run import Run

C = TypeVar("C", bound=TrainingConfig)
CHANGEABLE = {"epochs", "steps", "device", "kernels", "log_every", "eval_every", "save_every", "resume", "dry_run"}
CHANGEABLE |= {"max_loss_spike", "early_stopping", "track"}
CHANGEABLE |= LaunchOptions.model_fields.keys() | {"accelerate_config", "strategy", "offload"}
"""Settings that may change when a run is resumed."""
MOVABLE = {"model", "data", "eval_data"}
"""Settings in which ``config.yaml`` may name the same content at another place: the content is compared."""


def resume_config(flags: C) -> C:
    """Return the settings of the run that ``--resume`` names, overridden by the given ones.

    Args:
        flags: The settings of this command. Those that were set explicitly override the run's.

    Raises:
        CheckpointError: If it is not a run, or has no complete checkpoint.
        ConfigError: If it is a run of another verb, or a setting differs that cannot change when a run is resumed,
            in the flags or in an edited ``config.yaml``.
    """
    assert flags.resume is not None
    run = Run(flags.resume)
    saved = run.read_config()
    if not isinstance(saved, type(flags)):
        raise ConfigError(
            f"{flags.resume} is a run of hymba-tune {saved.verb}, not of {flags.verb}.",
            fix=command(saved.verb, "--resume", flags.resume),
        )
    changed = flags.given()
    if fixed := [name for name in changed.keys() - CHANGEABLE if changed[name] != getattr(saved, name)]:
        raise ConfigError(
            f"--resume continues {flags.resume} with its own settings; {_as_flags(fixed)} cannot change.",
            expected=f"at most: {_as_flags(CHANGEABLE - {'resume'})}",
            fix="leave it out, or start a new run with --model RUN",
        )
    _check_unedited(run, saved)
    run.last_checkpoint()  # raises if there is none
    return saved.model_copy(update=changed)


def for_processes(config: C, processes: int) -> C:
    """Return the settings of a resumed run for its number of processes: a step takes the rows that it took before.

    Args:
        config: The settings, as the run was started.
        processes: The number of processes now.

    Raises:
        ConfigError: If they cannot share the rows of a step evenly.
    """
    if config.resume is None:
        return config
    facts = Run(config.resume).facts()
    before = facts.get("processes", 1)
    rows = facts.get("global_batch", config.batch_size * config.grad_accum * before)
    # The losses of preferences are means over the rows that all processes take at once, so these stay together.
    together = config.batch_size * before // processes if isinstance(config, PreferenceConfig) else config.batch_size
    batch_size, grad_accum = divide_step(rows, processes, max(1, together))
    return config.model_copy(update={"batch_size": batch_size, "grad_accum": grad_accum})


def _check_unedited(run: Run, saved: TrainingConfig) -> None:
    """Check that ``config.yaml`` holds the settings that the run was started with, as far as they are recorded."""
    recorded = run.facts().get("settings", {})
    now = saved.model_dump(mode="json")
    edited = sorted(name for name in now.keys() & recorded.keys() - CHANGEABLE - MOVABLE if now[name] != recorded[name])
    if edited:
        first = edited[0]
        raise ConfigError(
            f"{run.path / 'config.yaml'} was edited: {_as_flags(edited)} cannot change when a run is resumed.",
            expected=f"{first}: {recorded[first]}, as the run was started, instead of {now[first]}",
            fix="restore the file, or start a new run with --model RUN",
        )


def _as_flags(names: Iterable[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in sorted(names))

"""The settings of a resumed run. This module does not import torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from hymba_tune.config import TrainingConfig
from hymba_tune.errors import ConfigError, command
from hymba_tune.train.run import Run

C = TypeVar("C", bound=TrainingConfig)
CHANGEABLE = {"epochs", "steps", "device", "kernels", "log_every", "eval_every", "save_every", "resume", "dry_run"}
CHANGEABLE |= {"max_loss_spike", "early_stopping", "track"}
"""Settings that may change when a run is resumed."""


def resume_config(flags: C) -> C:
    """Return the settings of the run that ``--resume`` names, overridden by the given ones.

    Args:
        flags: The settings of this command. Those that were set explicitly override the run's.

    Raises:
        CheckpointError: If it is not a run, or has no complete checkpoint.
        ConfigError: If it is a run of another verb, or a setting differs that cannot change when a run is resumed.
    """
    assert flags.resume is not None
    saved = Run(flags.resume).read_config()
    if not isinstance(saved, type(flags)):
        raise ConfigError(
            f"{flags.resume} is a run of hymba-tune {saved.verb}, not of {flags.verb}.",
            fix=command(saved.verb, "--resume", flags.resume),
        )
    changed = {name: getattr(flags, name) for name in flags.model_fields_set}
    if fixed := [name for name in changed.keys() - CHANGEABLE if changed[name] != getattr(saved, name)]:
        raise ConfigError(
            f"--resume continues {flags.resume} with its own settings; {_as_flags(fixed)} cannot change.",
            expected=f"at most: {_as_flags(CHANGEABLE - {'resume'})}",
            fix="leave it out, or start a new run with --model RUN",
        )
    Run(flags.resume).last_checkpoint()  # raises if there is none
    return saved.model_copy(update=changed)


def _as_flags(names: Iterable[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in sorted(names))

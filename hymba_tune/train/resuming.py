"""The settings of a run that is resumed; importing this imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from hymba_tune.config import TrainingConfig
from hymba_tune.errors import ConfigError
from hymba_tune.train.run import Run

C = TypeVar("C", bound=TrainingConfig)
CHANGEABLE = {"epochs", "steps", "device", "kernels", "log_every", "eval_every", "save_every", "resume", "dry_run"}
CHANGEABLE |= {"max_loss_spike", "early_stopping", "track"}
"""Settings that a run may be gone on with differently."""


def resume_config(given: C) -> C:
    """The settings of the run that ``--resume`` names, with those given now on top.

    Raises:
        CheckpointError: If it is not a run, or has no whole checkpoint.
        ConfigError: If another verb made it, or a setting is given that a run cannot be gone on with differently.
    """
    assert given.resume is not None
    saved = Run(given.resume).read_config()
    if not isinstance(saved, type(given)):
        raise ConfigError(
            f"{given.resume} is a run of hymba-tune {saved.verb}, not of {given.verb}.",
            fix=f"hymba-tune {saved.verb} --resume {given.resume}",
        )
    changed = {name: getattr(given, name) for name in given.model_fields_set}
    if fixed := [name for name in changed.keys() - CHANGEABLE if changed[name] != getattr(saved, name)]:
        raise ConfigError(
            f"--resume goes on with {given.resume} as it was started; {_as_flags(fixed)} cannot change.",
            expected=f"at most: {_as_flags(CHANGEABLE - {'resume'})}",
            fix="leave it out, or start a new run with --model RUN",
        )
    Run(given.resume).last_checkpoint()  # refuses a run that has none
    return saved.model_copy(update=changed)


def _as_flags(names: Iterable[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in sorted(names))

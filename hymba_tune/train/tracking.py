"""Live logging to other programs, by transformers' own integrations: ``--track``."""

from __future__ import annotations

import netrc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any
from urllib.parse import urlsplit

from hymba_tune.config import Tracker
from hymba_tune.errors import ConfigError
from hymba_tune.train.run import Run

PROJECT = "hymba-tune"
"""What runs are gathered under, where a tracker has such a thing and its user has not named another."""


def check_trackers(trackers: Sequence[Tracker]) -> None:
    """See that what is to be logged to is installed.

    Raises:
        ConfigError: If a package is missing.
    """
    if missing := [tracker.value for tracker in trackers if not _is_installed(tracker.value)]:
        raise ConfigError(
            f"--track {' '.join(missing)}: not installed.", fix=f"pip install {' '.join(missing)}, or leave it out"
        )


def _is_installed(package: str) -> bool:
    found = find_spec(package)
    # A folder of that name in the working directory, in which the tracker keeps its runs, is none.
    return found is not None and found.origin is not None


def tracker_arguments(run: Run, trackers: Sequence[Tracker]) -> dict[str, Any]:
    """Arguments of the trainer."""
    return {
        "report_to": [tracker.value for tracker in trackers] or "none",
        "run_name": run.name,
        "project": PROJECT,
    }


@contextmanager
def tracking(run: Run, trackers: Sequence[Tracker]) -> Iterator[None]:
    """Tell trackers where to write and how to call the project, as far as their user has not told them already.

    Nothing leaves the machine unless the user has logged in to a tracker or pointed it elsewhere.

    Args:
        run: In whose folder ``track/`` TensorBoard and W&B write.
        trackers: Those asked for.
    """
    settings = _settings(run, trackers)
    made = {name: value for name, value in settings.items() if name not in os.environ}
    os.environ.update(made)
    try:
        yield
    finally:
        for name in made:
            os.environ.pop(name, None)


def _settings(run: Run, trackers: Sequence[Tracker]) -> dict[str, str]:
    folder = run.path / "track"
    settings: dict[str, str] = {}
    if Tracker.tensorboard in trackers:
        settings["TENSORBOARD_LOGGING_DIR"] = str(folder / "tensorboard")
    if Tracker.mlflow in trackers:
        settings["MLFLOW_EXPERIMENT_NAME"] = PROJECT
    if Tracker.wandb in trackers:
        folder.mkdir(exist_ok=True)  # left to itself, W&B writes to the system's temporary folder instead
        settings |= {"WANDB_PROJECT": PROJECT, "WANDB_DIR": str(folder), "WANDB_SILENT": "true", "WANDB_CONSOLE": "off"}
        if not _has_wandb_login():
            settings["WANDB_MODE"] = "offline"  # it would ask for a key, and wait
    return settings


def _has_wandb_login() -> bool:
    """Whether `wandb login` has left a key. W&B itself, once asked, no longer heeds what it is told here."""
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        logins = netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError):
        logins = {}
    return "WANDB_API_KEY" in os.environ or host in logins

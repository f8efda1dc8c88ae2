"""Live logging to other programs by transformers' own integrations (``--track``)."""

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
"""The default project of trackers that group runs in projects."""


def check_trackers(trackers: Sequence[Tracker]) -> None:
    """Check that the trackers are installed.

    Raises:
        ConfigError: If a package is missing.
    """
    if missing := [tracker.value for tracker in trackers if not _is_installed(tracker.value)]:
        raise ConfigError(
            f"--track {' '.join(missing)}: not installed.", fix=f"pip install {' '.join(missing)}, or leave it out"
        )


def _is_installed(package: str) -> bool:
    spec = find_spec(package)
    # A folder of that name in the working directory, where a tracker may write its runs, has no origin.
    return spec is not None and spec.origin is not None


def tracker_arguments(run: Run, trackers: Sequence[Tracker]) -> dict[str, Any]:
    """Return the arguments of the trainer."""
    return {
        "report_to": [tracker.value for tracker in trackers] or "none",
        "run_name": run.name,
        "project": PROJECT,
    }


@contextmanager
def tracking(run: Run, trackers: Sequence[Tracker]) -> Iterator[None]:
    """Set the folder and the project of trackers by environment variables, except those that are set already.

    Nothing leaves the machine unless the user has logged in to a tracker or set another address.

    Args:
        run: The run. TensorBoard and W&B write to its folder ``track/``.
        trackers: The trackers in the settings.
    """
    settings = _settings(run, trackers)
    added = {name: value for name, value in settings.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _settings(run: Run, trackers: Sequence[Tracker]) -> dict[str, str]:
    folder = run.path / "track"
    settings: dict[str, str] = {}
    if Tracker.tensorboard in trackers:
        settings["TENSORBOARD_LOGGING_DIR"] = str(folder / "tensorboard")
    if Tracker.mlflow in trackers:
        settings["MLFLOW_EXPERIMENT_NAME"] = PROJECT
    if Tracker.wandb in trackers:
        folder.mkdir(exist_ok=True)  # otherwise W&B writes to the system's temporary folder
        settings |= {"WANDB_PROJECT": PROJECT, "WANDB_DIR": str(folder), "WANDB_SILENT": "true", "WANDB_CONSOLE": "off"}
        if not _has_wandb_login():
            settings["WANDB_MODE"] = "offline"  # otherwise W&B prompts for a key and waits
    return settings


def _has_wandb_login() -> bool:
    """Return whether `wandb login` has saved a key. After W&B's own check it would ignore the variables set here."""
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        logins = netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError):
        logins = {}
    return "WANDB_API_KEY" in os.environ or host in logins

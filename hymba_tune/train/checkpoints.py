"""Sealed checkpoints: those known to be complete, at whatever moment a run was killed."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from hymba_tune.files import is_whole

NAME = re.compile(r"checkpoint-\d+")
"""Names of checkpoints. What has another name, such as a copy ``checkpoint-3.bak``, is the user's."""


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, complete or not, the newest first."""
    found = [path for path in folder.glob("checkpoint-*") if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """Return the optimizer step after which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def newest_whole(folder: Path) -> Path | None:
    """Return the newest complete checkpoint of a folder; older ones are not read."""
    return next(filter(is_whole, checkpoints(folder)), None)


def forget_torn(folder: Path) -> None:
    """Remove incomplete checkpoints, so that none of them counts towards the limit on saved checkpoints."""
    for path in checkpoints(folder):
        if not is_whole(path):
            shutil.rmtree(path, ignore_errors=True)


def forget_oldest(folder: Path, *, keep: int, best: str | None) -> None:
    """Remove the oldest checkpoints. Transformers would also remove copies such as ``checkpoint-3.bak``.

    Args:
        folder: The folder of the checkpoints.
        keep: The number of checkpoints to keep.
        best: The checkpoint of the best evaluation, which stays.
    """
    newest_first = checkpoints(folder)
    kept = [path for path in newest_first if best and path == Path(best)]
    kept += [path for path in newest_first if path not in kept][: max(1, keep - len(kept))]
    for path in newest_first:
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)

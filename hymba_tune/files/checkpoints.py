"""Checkpoints of a run: those known to be complete, at whatever moment the run was killed."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from hymba_tune.errors import CheckpointError, ConfigError, did_you_mean
from hymba_tune.files.sealing import is_whole
from hymba_tune.files.torn import read_metrics

CHECKPOINTS = "checkpoints"
"""The folder of the checkpoints in a run directory."""
NAME = re.compile(r"checkpoint-\d+")
"""Names of checkpoints. What has another name, such as a copy ``checkpoint-3.bak``, is the user's."""


def check_run(path: Path) -> None:
    """Check that a folder is a run directory.

    Raises:
        CheckpointError: If it is not; the message names the run beside it whose name is most alike.
    """
    if (path / "config.yaml").is_file():
        return
    runs = [str(config.parent) for config in path.parent.glob("*/config.yaml")]
    raise CheckpointError(
        f"{path} is not a run: it has no config.yaml.", expected="runs/<name>", fix=did_you_mean(str(path), runs)
    )


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


def at_checkpoint(model: str, which: str | None) -> str:
    """Return the name of a run's checkpoint, as ``--model`` accepts it.

    Args:
        model: The directory of the run.
        which: ``last``, ``best`` (the lowest held-out loss of the checkpoints that are kept) or a step; None for the
            model as it is.

    Raises:
        ConfigError: If ``which`` is none of these.
        CheckpointError: If the model is not a run, or has no such checkpoint, or that is incomplete.
    """
    if which is None:
        return model
    if which not in ("last", "best") and not which.isdecimal():
        raise ConfigError(f"--checkpoint {which}: no such checkpoint.", expected="last, best, or a step")
    run = Path(model).expanduser()
    if not (run / "config.yaml").is_file():
        raise CheckpointError(
            f"--checkpoint {which}: {model} is not a run: it has no config.yaml.",
            expected="runs/<name>",
            fix="leave --checkpoint out",
        )
    steps = {step_of(path): path for path in checkpoints(run / CHECKPOINTS) if is_whole(path)}
    if which == "best":
        rows, _ = read_metrics(run / "metrics.jsonl")
        losses = {row["step"]: row["eval_loss"] for row in rows if row["step"] in steps and "eval_loss" in row}
        step = min(losses, key=lambda step: losses[step], default=None)
    else:
        step = max(steps, default=None) if which == "last" else int(which)
    if step is None or step not in steps:
        lacking = "has a held-out loss" if which == "best" and steps else "is there, or it is incomplete"
        raise CheckpointError(
            f"--checkpoint {which}: no such checkpoint of {run} {lacking}.",
            expected=f"last, or one of the steps {', '.join(map(str, sorted(steps)))}" if steps else "",
            fix="" if steps else "train again: no complete checkpoint is left",
        )
    return str(steps[int(step)])

"""A run's directory: its settings, its metrics and its results."""

from __future__ import annotations

import json
import logging
import platform
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from hymba_tune.config import SFTConfig, TrainingConfig
from hymba_tune.distributed.environment import is_main, rank
from hymba_tune.errors import CheckpointError, ConfigError
from hymba_tune.files import (
    PARTIAL,
    REPLACED,
    RUN,
    check_folder,
    entries,
    read_json,
    read_json_lines,
    read_metrics,
    read_yaml,
    remove,
    write_text,
)
from hymba_tune.files.checkpoints import check_run, forget_torn, newest_whole
from hymba_tune.train.screen import MetricsRow

PARTS = "held_out.jsonl"
"""The losses of the parts of the held-out data at each evaluation."""
LIBRARIES = ("hymba-tune", "torch", "transformers", "trl", "peft", "accelerate", "datasets")


class Run:
    """The directory of a run, ``runs/<name>/``. Of several processes only the first one writes to it.

    Args:
        path: The directory, which need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def name(self) -> str:
        """The directory's name."""
        return self.path.name

    @property
    def checkpoints(self) -> Path:
        """The directory of the trainer's checkpoints."""
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        """The directory of the trained adapter."""
        return self.path / "adapter"

    @property
    def model(self) -> Path:
        """The directory of the trained model, where all weights were trained."""
        return self.path / "model"

    @classmethod
    def choose(cls, config: TrainingConfig) -> Run:
        """Return a new run with its directory's path.

        Raises:
            ConfigError: If ``--out`` holds something that must not be replaced; see `check_folder`.
        """
        if config.out is None:
            parts = [Path(config.model).name, Path(config.data[0]).stem, time.strftime("%m%d-%H%M%S")]
            return cls(Path("runs") / re.sub(r"[^\w.-]+", "-", "-".join(parts)).lower())
        resume = f"--resume {config.out} to continue it, or " if (config.out / "config.yaml").is_file() else ""
        check_folder(config.out, RUN, overwrite=config.overwrite, fix=resume)
        return cls(config.out)

    def create(self, config: TrainingConfig) -> None:
        """Create the directory and write the resolved settings.

        Raises:
            ConfigError: If it cannot be written.
        """
        if not is_main():
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.write_config(config)
        except OSError as error:
            raise ConfigError(f"--out {self.path} cannot be written: {error.strerror}.", fix="another --out") from error

    def write_config(self, config: TrainingConfig) -> None:
        """Write ``config.yaml``."""
        if is_main():
            settings = {"verb": config.verb.name}
            settings |= config.model_dump(mode="json", exclude={"out", "resume"}, exclude_none=True)
            write_text(self.path / "config.yaml", yaml.safe_dump(settings, sort_keys=False))

    def read_config(self) -> TrainingConfig:
        """Return the settings that the run was started with.

        Raises:
            CheckpointError: If this is not a run's directory, or its settings cannot be read.
        """
        check_run(self.path)
        path = self.path / "config.yaml"
        try:
            settings = dict(read_yaml(path))
            verb = settings.pop("verb", SFTConfig.verb.name)  # the first version had one verb and did not write it
            kind = TrainingConfig.of(verb)
            if unknown := [str(name) for name in settings if name not in kind.model_fields]:
                raise CheckpointError(
                    f"{path} has settings that this version does not have: {', '.join(unknown)[:200]}.",
                    expected="a run of this version; CHANGELOG.md lists the settings that were renamed",
                    fix="start a new run, or resume this one with the version that began it",
                )
            return kind.model_validate(settings)
        except ValidationError as error:
            what = "; ".join(f"{'.'.join(map(str, one['loc'])) or 'settings'}: {one['msg']}" for one in error.errors())
            raise CheckpointError(f"{path} cannot be used: {what}.", fix="restore it as the run wrote it") from error
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}", fix="restore it as the run wrote it") from error

    def newest_checkpoint(self) -> Path | None:
        """Return the newest complete checkpoint, if there is any."""
        return newest_whole(self.checkpoints)

    def has_checkpoint(self) -> bool:
        """Return whether there is a complete checkpoint."""
        return self.newest_checkpoint() is not None

    def last_checkpoint(self) -> Path:
        """Return the newest complete checkpoint.

        Raises:
            CheckpointError: If there is none.
        """
        newest = self.newest_checkpoint()
        if newest is None:
            raise CheckpointError(
                f"{self.path} has no complete checkpoint to resume from.", fix="start again, with --out <new>"
            )
        return newest

    def record(self, **facts: Any) -> None:
        """Add facts to ``run.json``, with the versions and the machine."""
        if not is_main():
            return
        facts = {**self.facts(), **facts}
        facts["versions"] = {name: metadata.version(name) for name in LIBRARIES}
        facts["machine"] = {"python": platform.python_version(), "platform": platform.platform()}
        write_text(self.path / "run.json", json.dumps(facts, indent=2, ensure_ascii=False) + "\n")

    def facts(self) -> dict[str, Any]:
        """Return the content of ``run.json``; empty before the first `record`, and where a crash has torn the file."""
        return read_json(self.path / "run.json", dict) or {}

    def log(self, row: MetricsRow) -> None:
        """Add a line to ``metrics.jsonl``."""
        if not is_main():
            return
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(_as_line(row))

    def log_parts(self, step: int, parts: Sequence[tuple[float, float]]) -> None:
        """Add a line to ``held_out.jsonl``: the summed loss of each part of the held-out data, and what it is over."""
        if not is_main():
            return
        with (self.path / PARTS).open("a", encoding="utf-8") as file:
            sums, counts = zip(*parts, strict=True)
            file.write(json.dumps({"step": step, "sums": sums, "counts": counts}) + "\n")

    def rows(self) -> list[MetricsRow]:
        """Return the lines of ``metrics.jsonl``, without those that a crash has torn."""
        return [MetricsRow.of_columns(columns) for columns in read_metrics(self.path / "metrics.jsonl")[0]]

    def forget_leftovers(self) -> None:
        """Remove incomplete files of a killed process, and a run that this one has replaced."""
        if not is_main():
            return
        forget_torn(self.checkpoints)
        for path in entries(self.path):
            if RUN.has_part(path.name) and (path.name.endswith(PARTIAL) or path.name.startswith(f"{REPLACED}.")):
                remove(path)

    def forget_after(self, step: int) -> None:
        """Drop the lines of ``metrics.jsonl`` and ``held_out.jsonl`` after the step that a run is resumed from."""
        if not is_main():
            return
        lines = [_as_line(row) for row in self.rows() if row.step <= step]
        write_text(self.path / "metrics.jsonl", "".join(lines))
        if (self.path / PARTS).is_file():
            kept = [line for line in read_json_lines(self.path / PARTS) if line and line.get("step", 0) <= step]
            write_text(self.path / PARTS, "".join(json.dumps(line) + "\n" for line in kept))

    def evaluations(self) -> Iterator[MetricsRow]:
        """Return the lines with a held-out loss."""
        return (row for row in self.rows() if row.eval_loss is not None)

    @contextmanager
    def capturing_logs(self) -> Iterator[None]:
        """Write the logs and warnings of libraries to ``log.txt`` instead of the screen, or to ``log-RANK.txt``."""
        import datasets
        import transformers

        name = "log.txt" if is_main() else f"log-{rank()}.txt"
        handler = logging.FileHandler(self.path / name, encoding="utf-8", delay=True)
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
        transformers_logger = transformers.utils.logging
        progress_was_disabled = datasets.are_progress_bars_disabled()
        logging.captureWarnings(True)
        logging.getLogger().addHandler(handler)
        transformers_logger.disable_default_handler()
        transformers_logger.enable_propagation()
        transformers_logger.disable_progress_bar()
        datasets.disable_progress_bars()
        try:
            yield
        finally:
            logging.captureWarnings(False)
            logging.getLogger().removeHandler(handler)
            handler.close()
            transformers_logger.enable_default_handler()
            transformers_logger.disable_propagation()
            transformers_logger.enable_progress_bar()
            if not progress_was_disabled:
                datasets.enable_progress_bars()


def _as_line(row: MetricsRow) -> str:
    return json.dumps(row.as_columns()) + "\n"

"""A run as recorded in its files."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from hymba_tune.config import SFTConfig, TrainingConfig, Verb
from hymba_tune.errors import CheckpointError
from hymba_tune.files import read_yaml

SHOWN_DROPPED = 10
"""The number of dropped rows that are read in full; the others are only counted."""


@dataclass(frozen=True)
class RunRecord:
    """The content of a run's directory. Only the settings must exist, as a run may have ended at any point.

    Attributes:
        path: The directory.
        settings: The settings in ``config.yaml``, without the verb.
        verb: The command that made the run.
        facts: The content of ``run.json``.
        rows: The lines of ``metrics.jsonl``: numbers by name.
        samples: The answers in ``samples.json``: ``prompt``, ``reference``, ``before`` and, after training, ``after``.
        updates: The content of ``updates.json``: ``parts``, how far each moved, or the reason why it is ``absent``.
        evaluations: The results of `hymba-tune eval` in ``evaluations.json``, the oldest first.
        dropped: The first rows of ``dropped.jsonl``.
        reasons: The number of dropped rows by reason.
    """

    path: Path
    settings: dict[str, Any]
    verb: Verb
    facts: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, float]] = field(default_factory=list)
    samples: list[dict[str, str]] = field(default_factory=list)
    updates: dict[str, Any] = field(default_factory=dict)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    dropped: list[dict[str, Any]] = field(default_factory=list)
    reasons: dict[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> RunRecord:
        """Read a run's directory.

        Raises:
            CheckpointError: If the directory is not a run, or one of its files cannot be read.
        """
        if not (path / "config.yaml").is_file():
            raise CheckpointError(f"{path} is not a run: it has no config.yaml.", expected="runs/<name>")
        try:
            settings = dict(read_yaml(path / "config.yaml"))
            facts = _json(path / "run.json", {})
            dropped, reasons = _dropped(path / "dropped.jsonl")
            return cls(
                path=path,
                verb=_verb(settings.pop("verb", SFTConfig.verb.name)),
                settings=settings,
                facts=facts,
                rows=_rows(path / "metrics.jsonl"),
                samples=_json(path / "samples.json", []),
                updates=_json(path / "updates.json", {}),
                evaluations=_json(path / "evaluations.json", []),
                dropped=dropped,
                reasons=reasons,
            )
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(
                f"{path} cannot be read: {error}", fix="restore its files as the run wrote them"
            ) from error

    @property
    def name(self) -> str:
        """The directory's name."""
        return self.path.resolve().name

    @property
    def measures(self) -> list[str]:
        """Names of the measures without ``eval_``, in the order of their first row."""
        names = (name.removeprefix("eval_") for row in self.rows for name in row if name != "step")
        return list(dict.fromkeys(names))

    def series(self, measure: str) -> tuple[list[int], list[float]]:
        """Return the steps of a measure and its values."""
        known = [(int(row["step"]), row[measure]) for row in self.rows if measure in row]
        return [step for step, _ in known], [value for _, value in known]

    @property
    def source_losses(self) -> dict[str, tuple[list[int], list[float]]]:
        """The steps and held-out losses of each source, by its name, where there are several."""
        names = [name.removeprefix("loss/") for name in self.measures if name.startswith("loss/")]
        return {name: self.series(f"eval_loss/{name}") for name in names}

    @property
    def last_step(self) -> int:
        """The last step that was measured."""
        return int(max((row["step"] for row in self.rows), default=0))


def _verb(name: str) -> Verb:
    known = TrainingConfig.by_verb()
    # A run may come from a version with another set of verbs.
    return (
        known[name].verb
        if name in known
        else Verb(name, name, "", paired=False, logit_copies=0, accuracy=None, figures=())
    )


def _json(path: Path, absent: Any) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else absent


def _rows(path: Path) -> list[dict[str, float]]:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    # A killed run may have left an incomplete line.
    whole = (json.loads(line) for line in lines if line.endswith("\n"))
    rows = [{name: value for name, value in row.items() if isinstance(value, int | float)} for row in whole]
    for row in rows:
        # Before training both answers of a pair have the same reward, so an accuracy of 0 means nothing.
        if row.get("eval_margin") == 0:
            row.pop("eval_accuracy", None)
    return rows


def _dropped(path: Path) -> tuple[list[dict[str, Any]], dict[str, int]]:
    if not path.is_file():
        return [], {}
    with path.open(encoding="utf-8") as file:
        first = [json.loads(line) for line in islice(file, SHOWN_DROPPED)]
        reasons = Counter(row["reason"] for row in first)
        reasons.update(json.loads(line)["reason"] for line in file)
    return first, dict(reasons)

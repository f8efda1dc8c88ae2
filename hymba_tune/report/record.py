"""A run as its files tell it."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from hymba_tune.config import SFTConfig, TrainingConfig, Verb
from hymba_tune.errors import CheckpointError

SHOWN_DROPPED = 10
"""Dropped rows that are read in full; the others are counted."""


@dataclass(frozen=True)
class RunRecord:
    """What a run's directory says. Only its settings must be there: a run may have ended anywhere.

    Attributes:
        path: The directory.
        settings: ``config.yaml``, without the verb.
        verb: The command that made the run.
        facts: ``run.json``.
        rows: ``metrics.jsonl``, numbers by name.
        samples: ``samples.json``: ``prompt``, ``reference``, ``before`` and, at the end of a run, ``after``.
        updates: ``updates.json``: ``parts``, a list of how far each moved, or why it is ``absent``.
        evaluations: ``evaluations.json``: what `hymba-tune eval` measured, the oldest first.
        dropped: The first rows of ``dropped.jsonl``.
        reasons: How many rows were dropped for which reason.
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
            CheckpointError: If it is not one, or a file of it cannot be read.
        """
        if not (path / "config.yaml").is_file():
            raise CheckpointError(f"{path} is not a run: it has no config.yaml.", expected="runs/<name>")
        try:
            settings = dict(yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8")))
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
        except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
            raise CheckpointError(
                f"{path} cannot be read: {error}", fix="restore its files as the run wrote them"
            ) from error

    @property
    def name(self) -> str:
        """The directory's name."""
        return self.path.resolve().name

    @property
    def measures(self) -> list[str]:
        """Names of what was measured, held-out ones by what they measure, in the order of their first row."""
        names = (name.removeprefix("eval_") for row in self.rows for name in row if name != "step")
        return list(dict.fromkeys(names))

    def series(self, measure: str) -> tuple[list[int], list[float]]:
        """Steps, and what was measured at them."""
        known = [(int(row["step"]), row[measure]) for row in self.rows if measure in row]
        return [step for step, _ in known], [value for _, value in known]

    @property
    def source_losses(self) -> dict[str, tuple[list[int], list[float]]]:
        """The series of the held-out loss of each source, by its name, where there are several."""
        names = [name.removeprefix("loss/") for name in self.measures if name.startswith("loss/")]
        return {name: self.series(f"eval_loss/{name}") for name in names}

    @property
    def last_step(self) -> int:
        """As far as it got."""
        return int(max((row["step"] for row in self.rows), default=0))


def _verb(name: str) -> Verb:
    known = TrainingConfig.by_verb()
    # The report of a run can be written by a version that no longer has its verb.
    return (
        known[name].verb
        if name in known
        else Verb(name, name, "", paired=False, logit_copies=0, accuracy=None, figures=())
    )


def _json(path: Path, absent: Any) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else absent


def _rows(path: Path) -> list[dict[str, float]]:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    # A run that was killed may have left half a line.
    whole = (json.loads(line) for line in lines if line.endswith("\n"))
    rows = [{name: value for name, value in row.items() if isinstance(value, int | float)} for row in whole]
    for row in rows:
        # Before training the answers of a pair are equal in reward, so that none is ranked right: this says nothing.
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

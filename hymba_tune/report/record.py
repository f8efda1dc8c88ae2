"""A run as recorded in its files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from jinja2 import UndefinedError

from hymba_tune.config import SFTConfig, TrainingConfig, Verb
from hymba_tune.errors import CheckpointError
from hymba_tune.files import read_json, read_json_lines, read_metrics, read_yaml
from hymba_tune.files.checkpoints import check_run
from hymba_tune.significance import Outcome, compare_sums

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
        parts: The lines of ``held_out.jsonl`` by step: the summed losses of the parts of the held-out data, and what
            each is summed over.
        samples: The answers in ``samples.json``: ``prompt``, ``reference``, ``before`` and, after training, ``after``.
        rollouts: The content of ``rollouts.json``: the last ``groups`` of answers with their rewards, and the ``step``.
        updates: The content of ``updates.json``: ``parts``, how far each moved, or the reason why it is ``absent``.
        evaluations: The results of `hymba-tune eval` in ``evaluations.json``, the oldest first.
        dropped: The first rows of ``dropped.jsonl``.
        reasons: The number of dropped rows by reason.
        damaged: What a crash has made unreadable, in words; the other attributes are without it.
    """

    path: Path
    settings: dict[str, Any]
    verb: Verb
    facts: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, float]] = field(default_factory=list)
    parts: dict[int, tuple[list[float], list[float]]] = field(default_factory=dict)
    samples: list[dict[str, str]] = field(default_factory=list)
    rollouts: dict[str, Any] = field(default_factory=dict)
    updates: dict[str, Any] = field(default_factory=dict)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    dropped: list[dict[str, Any]] = field(default_factory=list)
    reasons: dict[str, int] = field(default_factory=dict)
    damaged: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> RunRecord:
        """Read a run's directory. Files that a crash has torn count as absent, and `damaged` names them.

        Raises:
            CheckpointError: If the directory is not a run, or its settings cannot be read.
        """
        check_run(path)
        try:
            settings = dict(read_yaml(path / "config.yaml"))
            verb = _verb(settings.pop("verb", SFTConfig.verb.name))
        except (ValueError, TypeError) as error:
            raise CheckpointError(
                f"{path / 'config.yaml'} cannot be read: {error}", fix="restore it as the run wrote it"
            ) from error

        rows, torn = _rows(path / "metrics.jsonl")
        dropped, reasons = _dropped(path / "dropped.jsonl")
        facts, updates, rollouts = (
            read_json(path / name, dict) for name in ("run.json", "updates.json", "rollouts.json")
        )
        samples, evaluations = (read_json(path / name, list) for name in ("samples.json", "evaluations.json"))
        contents = {
            "run.json": facts,
            "samples.json": samples,
            "rollouts.json": rollouts,
            "updates.json": updates,
            "evaluations.json": evaluations,
        }
        damaged = [name for name, content in contents.items() if content is None and (path / name).is_file()]
        damaged += [f"{torn:,} lines of metrics.jsonl"] if torn else []
        return cls(
            path=path,
            verb=verb,
            settings=settings,
            facts=facts or {},
            rows=rows,
            parts=_parts(path / "held_out.jsonl"),
            samples=[one for one in samples or [] if _is_sample(one)],
            rollouts=rollouts or {},
            updates=updates or {},
            evaluations=[one for one in evaluations or [] if isinstance(one, dict)],
            dropped=dropped,
            reasons=reasons,
            damaged=damaged,
        )

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

    def held_out(self, measure: str) -> tuple[list[int], list[float]]:
        """Return the steps and held-out values of a measure to show: no loss that is the reward with a minus sign."""
        negated = measure.partition("/")[0] == "loss" and any("eval_reward" in row for row in self.rows)
        return ([], []) if negated else self.series(f"eval_{measure}")

    @property
    def source_losses(self) -> dict[str, tuple[list[int], list[float]]]:
        """The steps and held-out losses of each source, by its name, where there are several."""
        names = [name.removeprefix("loss/") for name in self.measures if name.startswith("loss/")]
        curves = {name: self.held_out(f"loss/{name}") for name in names}
        return {name: curve for name, curve in curves.items() if curve[0]}

    @property
    def final_evaluation(self) -> int:
        """The index of the evaluation of the weights that the run ended with; of the last one if it has not ended."""
        steps, _ = self.series("eval_loss")
        kept = (self.facts.get("kept") or {}).get("step")
        return steps.index(kept) if kept in steps else len(steps) - 1

    def tested(self, before: int, after: int) -> Outcome | None:
        """Test whether the held-out loss of one step is lower than that of another; None where that is not recorded.

        Args:
            before: The step to compare with.
            after: The step that may be better.
        """
        if before not in self.parts or after not in self.parts:
            return None
        (first, counts), (last, counts_after) = self.parts[before], self.parts[after]
        return compare_sums(first, last, n=self.held_out_rows) if counts == counts_after else None

    @property
    def held_out_rows(self) -> int | None:
        """The number of held-out rows; None if it is not recorded."""
        rows = self.facts.get("held_out", {}).get("rows")
        return rows if isinstance(rows, int) else None

    @property
    def vocabulary(self) -> int | None:
        """The number of tokens of the model's head; None if it is not recorded."""
        size = self.facts.get("vocabulary")
        return size if isinstance(size, int) and size > 1 else None

    @property
    def last_step(self) -> int:
        """The last step that was measured."""
        return int(max((row["step"] for row in self.rows), default=0))


@contextmanager
def edits_explained(*paths: Path) -> Iterator[None]:
    """Explain errors that come from values of an unexpected kind in the files of runs, as people leave them.

    Args:
        paths: The directories of the runs.

    Raises:
        CheckpointError: Instead of these errors.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, UndefinedError) as error:
        raise CheckpointError(
            f"{', '.join(map(str, paths))}: a file holds something unexpected: {error!r}.",
            expected="config.yaml, run.json, updates.json and evaluations.json as the run wrote them",
            fix="restore them, or move away run.json, updates.json and evaluations.json",
        ) from error


def _verb(name: str) -> Verb:
    known = TrainingConfig.by_verb()
    # A run may come from a version with another set of verbs.
    return (
        known[name].verb
        if name in known
        else Verb(name, name, "", paired=False, logit_copies=0, accuracy=None, scores=False, figures=())
    )


def _rows(path: Path) -> tuple[list[dict[str, float]], int]:
    rows, torn = read_metrics(path)
    for row in rows:
        # Before training both answers of a pair have the same reward, so an accuracy of 0 means nothing.
        if row.get("eval_margin") == 0:
            row.pop("eval_accuracy", None)
    return rows, torn


def _parts(path: Path) -> dict[int, tuple[list[float], list[float]]]:
    found = {}
    for line in read_json_lines(path):
        step, sums, counts = ((line or {}).get(name) for name in ("step", "sums", "counts"))
        if type(step) is int and _are_numbers(sums) and _are_numbers(counts) and len(sums) == len(counts):
            found[step] = (sums, counts)
    return found


def _are_numbers(values: Any) -> TypeGuard[list[float]]:
    return isinstance(values, list) and all(type(value) in (int, float) for value in values)


def _is_sample(one: Any) -> bool:
    return isinstance(one, dict) and "prompt" in one and all(isinstance(text, str) for text in one.values())


def _dropped(path: Path) -> tuple[list[dict[str, Any]], dict[str, int]]:
    first: list[dict[str, Any]] = []
    reasons: Counter[str] = Counter()
    for row in read_json_lines(path):
        if row is not None and {"file", "reason", "what"} <= row.keys():
            reasons[str(row["reason"])] += 1
            first += [row] if len(first) < SHOWN_DROPPED else []
    return first, dict(reasons)

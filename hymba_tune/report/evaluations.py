"""Evaluations as tables: a line for each measure, a column for each model, and the change between two models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hymba_tune.formatting import format_bytes
from hymba_tune.significance import Outcome

ERROR = "_stderr"
NONE = "–"


@dataclass(frozen=True)
class Line:
    """One measure of all models.

    Attributes:
        label: The measure's name, with its unit.
        cells: The value of each model, and the change where the table has that column.
    """

    label: str
    cells: list[str]


@dataclass(frozen=True)
class EvaluationTable:
    """The table of one evaluation.

    Attributes:
        when: The time of the evaluation, as recorded.
        what: The data and tasks of the evaluation.
        columns: The models' names, and "change" where there are two: the first model's value less the second's.
        lines: The measures.
        verdicts: Whether the first model is better than each other one, a line each.
    """

    when: str
    what: str
    columns: list[str]
    lines: list[Line]
    verdicts: list[str]


def tabulate(facts: dict[str, Any]) -> EvaluationTable:
    """Return the table of an evaluation that `hymba_tune.evaluate` recorded."""
    models = facts["models"]
    columns = [_short(model["name"]) for model in models]
    texts = [model["measures"] for model in models]
    lines = [
        _line(label, texts, name, written)
        for name, (label, written) in TEXT_MEASURES.items()
        if any(name in measures for measures in texts)
    ]
    for task in dict.fromkeys(task for model in models for task in model["tasks"]):
        values = [model["tasks"].get(task, {}) for model in models]
        names = dict.fromkeys(name for one in values for name in one if not name.endswith(ERROR))
        lines += [_line(f"{task}: {name}", values, name, "{:.4g}".format) for name in names]
    lines.append(Line("weights", [format_bytes(model["weight_bytes"]) for model in models] + [""] * (len(models) == 2)))
    columns += ["change"] * (len(models) == 2)
    return EvaluationTable(facts["when"], _what(facts), columns, lines, _verdicts(facts))


def _verdicts(facts: dict[str, Any]) -> list[str]:
    """Say for each other model on which measures the first one is better, with the number of rows."""
    verdicts = []
    for one in facts.get("compared", []):
        tests = [
            f"{TEXT_MEASURES[name][0].partition(',')[0]} {Outcome.of_facts(test)}"
            for name, test in one["tests"].items()
        ]
        if tests:
            verdicts.append(f"against {_short(one['with'])}: {' · '.join(tests)}")
    return verdicts


def _short(name: str) -> str:
    """Return the last part of a path, and other names as they are."""
    return name.rsplit("/", 1)[-1] if name.startswith("/") else name


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


TEXT_MEASURES: dict[str, tuple[str, Callable[[float], str]]] = {
    "loss": ("loss, nats a token", "{:.4f}".format),
    "perplexity": ("perplexity of a token", "{:,.4g}".format),
    "bits_per_byte": ("bits a byte", "{:.4f}".format),
    "token_accuracy": ("tokens that are the likeliest", _percent),
    "exact_match": ("right answers", _percent),
    "answers_found": ("answers to compare", _percent),
}
"""Labels and formats of the measures, in the order in which they are shown."""


def _line(label: str, models: Sequence[dict[str, float]], name: str, written: Callable[[float], str]) -> Line:
    cells = []
    for measures in models:
        value, error = measures.get(name), measures.get(f"{name}{ERROR}")
        margin = f" ± {written(error)}" if error is not None and value is not None else ""
        cells.append(NONE if value is None else f"{written(value).removesuffix(' %' if margin else '')}{margin}")
    if len(models) == 2:
        first, second = (measures.get(name) for measures in models)
        cells.append("" if first is None or second is None else _signed(written, first - second))
    return Line(label, cells)


def _signed(written: Callable[[float], str], change: float) -> str:
    return f"{'+' if change > 0 else '−' if change < 0 else '±'}{written(abs(change))}"


def _what(facts: dict[str, Any]) -> str:
    settings = facts["settings"]
    first = facts["models"][0]
    data = first.get("data")
    parts = [*settings.get("data", []), *settings.get("tasks", [])]
    if data:
        parts.append(f"{data['rows']:,} rows, {data['tokens']:,} tokens scored")
        if data["bad_rows"]:
            parts.append(f"{data['bad_rows']:,} bad rows left out")
    return " · ".join(parts)

"""One row of a data file, where it stands, and the error that says what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from hymba_tune.errors import DataError


@dataclass(frozen=True, slots=True)
class RowLocation:
    """Where a row stands.

    Attributes:
        file: The file or dataset as its user wrote it.
        number: From 1. Of a line where rows are lines, else of the row.
        unit: What ``number`` counts.
    """

    file: str
    number: int
    unit: Literal["line", "row"] = "line"

    def __str__(self) -> str:
        return f"{self.file}, {self.unit} {self.number}"


@dataclass(frozen=True, slots=True)
class SourceRow:
    """A row as it was read: its value, or the error that kept it from being read."""

    place: RowLocation
    value: object = None
    error: DataError | None = None


class RowError(DataError):
    """A row that cannot be used, named by its place.

    Args:
        place: Where the row stands.
        problem: What is wrong with it, from whoever found it without knowing the place.
        extent: How many such rows there are, in words; nothing where rows cannot be skipped.
    """

    def __init__(self, place: RowLocation, problem: DataError, *, extent: str = "") -> None:
        super().__init__(
            f"Cannot use {place}: {problem.what}.",
            expected=problem.details["expected"],
            fix=problem.details["to fix"],
            skip=f"--on-bad-row skip   ({extent})" if extent else "",
        )


def listing(names: Iterable[object]) -> str:
    """Names as a person lists them: ``a, b, c``."""
    return ", ".join(str(name) for name in names)

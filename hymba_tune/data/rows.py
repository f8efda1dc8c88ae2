"""A row of a data file, its place, and the error of a row that cannot be used."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from hymba_tune.errors import DataError

ColumnChoice = Callable[[Sequence[str]], Collection[str]]
"""Returns those of a table's columns that have to be read."""


@dataclass(frozen=True, slots=True)
class RowLocation:
    """The place of a row in a file or dataset.

    Attributes:
        file: Name of the file or dataset as the user gave it.
        number: Number of the line or row, from 1.
        unit: Whether ``number`` counts lines or rows.
    """

    file: str
    number: int
    unit: Literal["line", "row"] = "line"

    def __str__(self) -> str:
        return f"{self.file}, {self.unit} {self.number}"


@dataclass(frozen=True, slots=True)
class SourceRow:
    """A row as it was read.

    Attributes:
        place: Where the row was read.
        value: Its value; `None` if it could not be read.
        error: The error that prevented the reading, if any.
    """

    place: RowLocation
    value: object = None
    error: DataError | None = None


class RowError(DataError):
    """The error of a row that cannot be used, with its place.

    Args:
        place: Where the row was read.
        problem: The error without the place.
        extent: The number of such rows in words; empty if rows cannot be skipped.
    """

    def __init__(self, place: RowLocation, problem: DataError, *, extent: str = "") -> None:
        super().__init__(
            f"Cannot use {place}: {problem.what}.",
            expected=problem.details["expected"],
            fix=problem.details["to fix"],
            skip=f"--on-bad-row skip   ({extent})" if extent else "",
        )


def listing(names: Iterable[object]) -> str:
    """Join names to a list: ``a, b, c``."""
    return ", ".join(str(name) for name in names)

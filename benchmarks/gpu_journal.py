"""What the GPU benchmark has measured: appended to a file as it comes, and made into tables from that file.

Every line is a JSON object: the first one of a run has its machine and options, the others a table's columns, a row, a
note or a failure. A run that is killed has lost nothing that a line says.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness import Cell, Options, description, formatted, report, slug

Row = Mapping[str, Cell]
Entry = dict[str, Any]


class Journal:
    """The lines of one run, in memory and in a file.

    Args:
        path: The file that is appended to; None for none.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.entries: list[Entry] = []
        self._path = path

    @classmethod
    def of(cls, options: Options) -> Journal:
        """Return the journal of a run with these options, in the folder for the results."""
        return cls(options.out and options.out / f"gpu.{slug(options.device)}.jsonl")

    def write(self, **entry: Any) -> None:
        """Append a line, which is on the disk when this returns."""
        self.entries.append(entry)
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def begin(self, options: Options) -> None:
        """Append the first line of a run."""
        self.write(**description(options))

    def continue_run(self) -> None:
        """Take up what an earlier process has written of the same run."""
        if self._path is not None and self._path.is_file():
            self.entries = last_run(read(self._path))


@dataclass
class Table:
    """A table that is being measured.

    Attributes:
        name: The table's name.
        journal: Where its rows and notes go.
        rows: Its rows so far.
    """

    name: str
    journal: Journal
    rows: list[Row] = field(default_factory=list)

    def add(self, row: Row) -> None:
        """Write a row, and print it."""
        self.rows.append(row)
        self.journal.write(table=self.name, row=dict(row))
        cells = ", ".join(f"{name} {formatted(cell)}" for name, cell in row.items() if cell is not None)
        sys.stdout.write(f"{self.name}: {cells}\n")
        sys.stdout.flush()

    def extend(self, rows: Iterable[Row]) -> None:
        """Write rows as they come."""
        for row in rows:
            self.add(row)

    def note(self, *notes: str) -> None:
        """Write what a reader must know to read the numbers."""
        for note in notes:
            self.journal.write(table=self.name, note=note)


def read(path: Path) -> list[Entry]:
    """Return the lines of a file; the last one may be torn by a kill, and is left out then."""
    entries: list[Entry] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue
    return entries


def last_run(entries: list[Entry]) -> list[Entry]:
    """Return the lines of the last run."""
    starts = [place for place, entry in enumerate(entries) if "run" in entry]
    return entries[starts[-1] :] if starts else []


def report_tables(entries: list[Entry], options: Options) -> None:
    """Print the tables of a run, and write each to a file, as other benchmarks do.

    Args:
        entries: The lines of the run, which may have been measured on another machine.
        options: The command-line options.
    """
    described = next((entry for entry in entries if "run" in entry), None)
    for name in dict.fromkeys(entry["table"] for entry in entries if "table" in entry):
        own = [entry for entry in entries if entry.get("table") == name]
        columns = dict.fromkeys(column for entry in own for column in entry.get("columns", ()))
        notes = dict.fromkeys(entry["note"] for entry in own if "note" in entry)
        rows = [entry["row"] for entry in own if "row" in entry]
        report(f"gpu_{name}", list(columns), rows, list(notes), options, described)

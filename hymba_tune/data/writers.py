"""Writes rows to files, by the ending of the name; a file is renamed to its name when it is complete."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from hymba_tune.data.readers import KINDS, kind
from hymba_tune.data.rows import listing
from hymba_tune.data.values import UnreadValue, kind_of
from hymba_tune.errors import DataError
from hymba_tune.files import atomic_write, check_file, write_errors

Write = Callable[[Any], None]
PARQUET_ROWS = 1024


def check_target(path: Path, *, overwrite: bool = False, inputs: Iterable[Path] = ()) -> None:
    """Check that a file of rows can be written, before anything is read.

    Args:
        path: The file.
        overwrite: Whether it may replace an existing file.
        inputs: The files that are read.

    Raises:
        DataError: If its ending is unknown.
        ConfigError: If it must not be written; see `check_file`.
    """
    if kind(path) not in KINDS or (path.suffix == ".gz" and kind(path) == ".parquet"):
        raise DataError(
            f"Cannot write {path}: its ending is unknown.",
            expected=f"{listing(KINDS)} (also with .gz, except .parquet)",
        )
    check_file("--out", path, overwrite=overwrite, inputs=inputs)


@contextmanager
def writing(path: Path, columns: Mapping[str, pa.DataType], *, overwrite: bool = False) -> Iterator[Write]:
    """Open a file for writing; the context gives a function that writes one row.

    The file gets its name when the block ends without an error.

    Args:
        path: The file; its ending decides the file type.
        columns: Columns of the rows, and their types in Parquet. Lists become JSON text in tables of text.
        overwrite: Whether an existing file is replaced.

    Raises:
        ConfigError: If the file cannot be written.
    """
    with (
        write_errors("--out", path),
        atomic_write(path, overwrite=overwrite) as part,
        _writer(path, part, columns) as write,
    ):
        yield write


@contextmanager
def _writer(path: Path, part: Path, columns: Mapping[str, pa.DataType]) -> Iterator[Write]:
    if kind(path) == ".parquet":
        with _parquet(part, columns) as write:
            yield write
        return
    zipped = path.suffix == ".gz"
    with part.open("wb") as raw, gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if zipped else raw as packed:
        text = io.TextIOWrapper(packed, encoding="utf-8", newline="")
        with KIND_WRITERS[kind(path)](text, columns) as write:
            yield write
        text.flush()
        text.detach()


def _json(row: dict[str, Any]) -> str:
    text = json.dumps(row, ensure_ascii=False, default=_as_json)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a character, in a row that has not been parsed
        return json.dumps(row, default=_as_json)
    return text


def _as_json(value: object) -> str:
    """Write a value of a table that JSON lacks, such as a date, as text."""
    if isinstance(value, bytes | UnreadValue):
        raise DataError(f"it holds {kind_of(value)}", expected="values that JSON can hold", fix="remove the column")
    return str(value)


@contextmanager
def _lines(file: TextIO, _: Mapping[str, pa.DataType]) -> Iterator[Write]:
    yield lambda row: _ignore(file.write(_json(row) + "\n"))


@contextmanager
def _array(file: TextIO, _: Mapping[str, pa.DataType]) -> Iterator[Write]:
    separator = "[\n"

    def write(row: dict[str, Any]) -> None:
        nonlocal separator
        file.write(separator + _json(row))
        separator = ",\n"

    yield write
    file.write("\n]\n" if separator.startswith(",") else "[]\n")


def _table(delimiter: str) -> Callable[[TextIO, Mapping[str, pa.DataType]], Any]:
    @contextmanager
    def table(file: TextIO, columns: Mapping[str, pa.DataType]) -> Iterator[Write]:
        writer = csv.DictWriter(file, list(columns), delimiter=delimiter)
        writer.writeheader()
        yield lambda row: _ignore(writer.writerow({name: _cell(value) for name, value in row.items()}))

    return table


@contextmanager
def _parquet(part: Path, columns: Mapping[str, pa.DataType]) -> Iterator[Write]:
    schema = pa.schema(list(columns.items()))
    buffer: list[dict[str, Any]] = []
    with pq.ParquetWriter(part, schema) as writer:

        def flush() -> None:
            writer.write_table(pa.Table.from_pylist(buffer, schema))
            buffer.clear()

        def write(row: dict[str, Any]) -> None:
            buffer.append(
                {name: _cell(value) if schema.field(name).type == pa.string() else value for name, value in row.items()}
            )
            if len(buffer) == PARQUET_ROWS:
                flush()

        yield write
        flush()


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value


def _ignore(_: object) -> None:
    return None


KIND_WRITERS: dict[str, Callable[[TextIO, Mapping[str, pa.DataType]], Any]] = {
    ".jsonl": _lines,
    ".ndjson": _lines,
    ".json": _array,
    ".csv": _table(","),
    ".tsv": _table("\t"),
}

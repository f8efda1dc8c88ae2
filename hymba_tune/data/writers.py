"""Rows into a file, by the kind its name ends in; written aside and renamed when it is whole."""

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
from hymba_tune.errors import DataError
from hymba_tune.files import atomic_write, check_file, write_errors

Write = Callable[[Any], None]
PARQUET_ROWS = 1024


def check_target(path: Path, *, overwrite: bool = False, inputs: Iterable[Path] = ()) -> None:
    """Check that a file of rows can be written, before anything is read.

    Args:
        path: The file.
        overwrite: Whether it may replace a file.
        inputs: The files that are read.

    Raises:
        DataError: If its ending is not known.
        ConfigError: If it must not be written; see `check_file`.
    """
    if kind(path) not in KINDS or (path.suffix == ".gz" and kind(path) == ".parquet"):
        raise DataError(
            f"Cannot write {path}: its ending is none of the known ones.",
            expected=f"{listing(KINDS)} (also with .gz, but for .parquet)",
        )
    check_file("--out", path, overwrite=overwrite, inputs=inputs)


@contextmanager
def writing(path: Path, columns: Mapping[str, pa.DataType], *, overwrite: bool = False) -> Iterator[Write]:
    """A function that takes one row after the other; the file is there once the block ends without an error.

    Args:
        path: Its ending says the kind.
        columns: Which columns rows have, and their types in Parquet. Lists become JSON text in tables of text.
        overwrite: Whether a file that is there is replaced.

    Raises:
        ConfigError: If it cannot be written.
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
    text = json.dumps(row, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a character, which stands in a row that nobody has looked at
        return json.dumps(row)
    return text


@contextmanager
def _lines(file: TextIO, _: Mapping[str, pa.DataType]) -> Iterator[Write]:
    yield lambda row: _ignore(file.write(_json(row) + "\n"))


@contextmanager
def _array(file: TextIO, _: Mapping[str, pa.DataType]) -> Iterator[Write]:
    before = "[\n"

    def write(row: dict[str, Any]) -> None:
        nonlocal before
        file.write(before + _json(row))
        before = ",\n"

    yield write
    file.write("\n]\n" if before.startswith(",") else "[]\n")


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
    waiting: list[dict[str, Any]] = []
    with pq.ParquetWriter(part, schema) as writer:

        def flush() -> None:
            writer.write_table(pa.Table.from_pylist(waiting, schema))
            waiting.clear()

        def write(row: dict[str, Any]) -> None:
            waiting.append(
                {name: _cell(value) if schema.field(name).type == pa.string() else value for name, value in row.items()}
            )
            if len(waiting) == PARQUET_ROWS:
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

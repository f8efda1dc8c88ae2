"""Reads files of each type as streams of rows. Only JSON documents (not JSON lines) are read into memory whole."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from hymba_tune.data.rows import RowLocation, SourceRow, listing
from hymba_tune.errors import DataError

GZIP_MARK = b"\x1f\x8b"
UTF8_MARK = b"\xef\xbb\xbf"
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
OTHER_FORMATS = {
    b"PK\x03\x04": "a zip archive (or a spreadsheet)",
    b"\xfd7zXZ": "xz",
    b"BZh": "bzip2",
    b"(\xb5/\xfd": "Zstandard",
    b"PAR1": "Parquet",
    b"%PDF": "PDF",
    b"SQLite": "a database",
    b"ARROW1": "Arrow",
}
"""First bytes of files that are not text, whatever the endings of their names."""
PARQUET_BATCH = 256
LARGEST_CELL = 2**26  # the csv module stops at 2**17, less than one long document; a quote left open stops here

UTF8 = "UTF-8"
TO_UTF8 = "save the file as UTF-8 (iconv -f CP1252 -t UTF-8 OLD > NEW)"


def read_file(path: Path, name: str) -> Iterator[SourceRow]:
    """Read the rows of a file, gzipped or not, by the ending of its name.

    Args:
        path: The file; its `kind` must be one of `KINDS`.
        name: Name of the file in error messages.

    Yields:
        Rows in the order of the file. A row that cannot be read holds its error; later rows follow it.

    Raises:
        DataError: If the file as a whole cannot be read.
    """
    try:
        if kind(path) == ".parquet":
            yield from read_parquet(path, name)
        else:
            with closing(_open(path, name)) as file:
                yield from READERS[kind(path)](file, name)
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        raise unreadable(name, error) from error


def unreadable(name: str, error: Exception) -> DataError:
    """Build the error of a file that cannot be opened or read to its end."""
    if isinstance(error, PermissionError):
        return DataError(f"Cannot read {name}: permission denied.", expected="a readable file", fix=f"chmod u+r {name}")
    return DataError(f"Cannot read {name}: {error}.", fix="check that the file is complete and readable")


def kind(path: Path) -> str:
    """Return the ending that decides how a file is read: ``.jsonl`` for ``a.jsonl`` and ``a.jsonl.gz``."""
    return Path(path.stem if path.suffix == ".gz" else path.name).suffix.lower()


def _open(path: Path, name: str) -> BinaryIO:
    with path.open("rb") as file:
        first_bytes = file.read(8)
    mark = first_bytes[:2]
    for signature, what in OTHER_FORMATS.items():
        if first_bytes.startswith(signature):
            raise DataError(
                f"Cannot read {name}: it is {what}.",
                expected="text, or gzipped text",
                fix="unpack or export it; name a Parquet file .parquet",
            )
    if mark in UTF16_MARKS:
        raise DataError(f"Cannot read {name}: it is UTF-16.", expected=UTF8, fix=TO_UTF8.replace("CP1252", "UTF-16"))
    if mark == GZIP_MARK:
        return cast(BinaryIO, io.BufferedReader(gzip.open(path, "rb")))
    return path.open("rb")


def read_jsonl(file: BinaryIO, name: str) -> Iterator[SourceRow]:
    """Read one JSON value per line. Blank lines count as lines but are not rows."""
    for number, line in enumerate(file, start=1):
        place = RowLocation(name, number)
        try:
            text = _decode(line, first=number == 1).rstrip()
            if text:
                yield SourceRow(place, _parse(text))
        except DataError as error:
            yield SourceRow(place, error=error)


def read_json(file: BinaryIO, name: str) -> Iterator[SourceRow]:
    """Read an array of rows, an object that holds one array, or JSON lines in a file named ``.json``."""
    first = file.readline()
    second = file.readline()
    file.seek(0)
    if second.strip() and _is_json(first):
        yield from read_jsonl(file, name)
        return
    try:
        values = _only_list(_parse(_decode(file.read(), first=True)))
    except DataError as error:
        problem, expected = error.what, error.details["expected"]
        raise DataError(f"Cannot use {name}: {problem}.", expected=expected, fix=error.details["to fix"]) from None
    for number, value in enumerate(values, start=1):
        yield SourceRow(RowLocation(name, number, "row"), value)


def _decode(raw: bytes, *, first: bool) -> str:
    try:
        return (raw.removeprefix(UTF8_MARK) if first else raw).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"byte {error.start + 1} is not UTF-8", expected=UTF8, fix=TO_UTF8) from None


def _parse(text: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text.rstrip() else ""
        what = f"not JSON at {line}column {error.colno} ({error.msg})"
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, nesting without end
        what = f"JSON that cannot be read ({error})"
    raise DataError(
        what,
        expected="JSON lines (.jsonl), or one JSON array (.json)",
        fix="fix the text there, or rename the file to match its content",
    )


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _only_list(document: object) -> list[object]:
    if isinstance(document, list):
        return document
    fields = document if isinstance(document, dict) else {}
    lists = {key: value for key, value in fields.items() if isinstance(value, list)}
    if len(lists) == 1:
        return next(iter(lists.values()))
    raise DataError(
        f"it holds {len(lists)} lists ({listing(lists)})" if lists else "it holds no list of rows",
        expected="an array of objects, or an object with one such array",
        fix="keep the one array of rows",
    )


def read_csv(file: BinaryIO, name: str) -> Iterator[SourceRow]:
    """Read a table with a header, separated by commas, semicolons or tabs. The place of a row is its first line."""
    csv.field_size_limit(LARGEST_CELL)
    # Bytes that are not UTF-8 become lone surrogates: their row gets an error, and later rows can be read.
    with io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
        first = text.readline()
        table = csv.reader(chain([first], text), delimiter=max(",;\t", key=first.count), strict=True)
        header: list[str] = []
        while True:
            place = RowLocation(name, table.line_num + 1)
            try:
                cells = next(table)
            except StopIteration:
                return
            except csv.Error as error:
                yield SourceRow(
                    place, error=DataError(f"not CSV ({error})", fix="close every quote, and double those inside")
                )
                continue
            if not header:
                header = cells
            elif cells:
                yield _table_row(place, header, cells)


def _table_row(place: RowLocation, header: list[str], cells: list[str]) -> SourceRow:
    if len(cells) != len(header):
        what = f"it has {len(cells)} fields, the header {len(header)} ({listing(header)})"
        return SourceRow(place, error=DataError(what, fix="put fields with separators or line breaks in quotes"))
    try:
        "".join(cells).encode()
    except UnicodeEncodeError:
        return SourceRow(place, error=DataError("it is not UTF-8", expected=UTF8, fix=TO_UTF8))
    return SourceRow(place, dict(zip(header, cells, strict=True)))


def read_parquet(path: Path, name: str) -> Iterator[SourceRow]:
    """Read the rows of a Parquet table, a batch in memory at a time."""
    number = 0
    with pq.ParquetFile(path) as table:
        for batch in table.iter_batches(batch_size=PARQUET_BATCH):
            for value in batch.to_pylist():
                number += 1
                yield SourceRow(RowLocation(name, number, "row"), value)


READERS: dict[str, Callable[[BinaryIO, str], Iterator[SourceRow]]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
}
KINDS = (*READERS, ".parquet")

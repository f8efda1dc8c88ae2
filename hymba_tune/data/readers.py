"""Reads files of each type as streams of rows. Only JSON documents (not JSON lines) are read into memory whole."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import shlex
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from hymba_tune.data.formats import has_format
from hymba_tune.data.messages import holds_messages
from hymba_tune.data.rows import ColumnChoice, RowLocation, SourceRow, listing
from hymba_tune.data.values import NOT_NEEDED, UnreadValue, kind_of, parse_json, parse_json_documents, shown
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
BATCH_ROWS = 256
CELL_ERRORS = (ValueError, ArithmeticError, LookupError, TypeError, pa.ArrowException)
"""What Arrow raises at a cell that Python cannot hold: years past 9999, unknown time zones, text that is not UTF-8."""
SEPARATOR_LINE = re.compile(r"sep=(.)\s*", re.IGNORECASE)
LARGEST_CELL = 2**26  # the csv module stops at 2**17, less than one long document; a quote left open stops here

UTF8 = "UTF-8"
TO_UTF8 = "save the file as UTF-8 (iconv -f CP1252 -t UTF-8 OLD > NEW)"


def read_file(path: Path, name: str, choose: ColumnChoice | None = None) -> Iterator[SourceRow]:
    """Read the rows of a file, gzipped or not, by the ending of its name.

    Args:
        path: The file; its `kind` must be one of `KINDS`.
        name: Name of the file in error messages.
        choose: Chooses the columns to read, where the file's type allows to read only some.

    Yields:
        Rows in the order of the file. A row that cannot be read holds its error; later rows follow it.

    Raises:
        DataError: If the file as a whole cannot be read.
    """
    try:
        if kind(path) == ".parquet":
            yield from read_parquet(path, name, choose)
        else:
            with closing(_open(path, name)) as file:
                yield from READERS[kind(path)](file, name)
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        raise unreadable(name, error) from error


def unreadable(name: str, error: Exception) -> DataError:
    """Build the error of a file that cannot be opened or read to its end."""
    if isinstance(error, PermissionError):
        return DataError(
            f"Cannot read {name}: permission denied.", expected="a readable file", fix=f"chmod u+r {shlex.quote(name)}"
        )
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
                yield SourceRow(place, _row(_parse(text)))
        except DataError as error:
            yield SourceRow(place, error=error)


def read_json(file: BinaryIO, name: str) -> Iterator[SourceRow]:
    """Read a document of rows in any of these shapes, or JSON lines in a file named ``.json``.

    An array of rows or of conversations; one row; objects one after the other, each over any number of lines; an object
    that holds one array of rows; an object whose values are rows.
    """
    first = file.readline()
    second = file.readline()
    file.seek(0)
    if second.strip() and _is_json(first):
        yield from read_jsonl(file, name)
        return
    try:
        values = _rows_in(_documents(_decode(file.read(), first=True)))
    except DataError as error:
        problem, expected = error.what, error.details["expected"]
        raise DataError(f"Cannot use {name}: {problem}.", expected=expected, fix=error.details["to fix"]) from None
    for number, value in enumerate(values, start=1):
        yield SourceRow(RowLocation(name, number, "row"), _row(value))


def _row(value: object) -> object:
    """Return the row that a JSON value is: a bare list of messages is a conversation."""
    return {"messages": value} if holds_messages(value) else value


def _decode(raw: bytes, *, first: bool) -> str:
    try:
        return (raw.removeprefix(UTF8_MARK) if first else raw).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"byte {error.start + 1} is not UTF-8", expected=UTF8, fix=TO_UTF8) from None


def _parse(text: str) -> object:
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text.rstrip() else ""
        what = f"not JSON at {line}column {error.colno} ({error.msg})"
    except ValueError as error:  # an integer of thousands of digits, nesting without end, a key twice
        what = f"JSON that cannot be read ({error})"
    raise DataError(
        what,
        expected="JSON lines (.jsonl), or one JSON array (.json)",
        fix="fix the text there, or rename the file to match its content",
    )


def _documents(text: str) -> list[object]:
    """Parse the values of a file that does not hold one value a line: usually a single one."""
    try:
        documents = parse_json_documents(text)
    except ValueError:
        documents = []
    return documents or [_parse(text)]  # which names what is wrong


def _is_json(line: bytes) -> bool:
    try:
        parse_json(line.decode())
    except ValueError:
        return False
    return True


def _rows_in(documents: list[object]) -> list[object]:
    """Return the rows of a file's values."""
    if len(documents) > 1:
        return documents
    document = documents[0]
    if holds_messages(document):
        return [document]
    if isinstance(document, list):
        return document
    if isinstance(document, dict) and document:
        return _rows_in_object(document)
    raise DataError(
        f"it holds {kind_of(document)} and no rows" if document else "it has no rows",
        expected="an array of objects, or an object with one such array",
    )


def _rows_in_object(document: dict[str, object]) -> list[object]:
    values = list(document.values())
    if has_format(document):
        return [document]
    if all(isinstance(value, dict) for value in values):
        if all(isinstance(value, dict) and value and all(key.isdigit() for key in value) for value in values):
            raise DataError(
                "it holds columns instead of rows",
                expected="an array of objects",
                fix='with pandas, write it by to_json(orient="records")',
            )
        return values
    lists = {key: value for key, value in document.items() if isinstance(value, list)}
    if len(lists) == 1:
        (value,) = lists.values()
        return [document] if holds_messages(value) else value
    if lists:
        raise DataError(
            f"it holds {len(lists)} lists ({listing(lists)})",
            expected="an array of objects, or an object with one such array",
            fix="keep the one array of rows",
        )
    return [document]


def read_csv(file: BinaryIO, name: str) -> Iterator[SourceRow]:
    """Read a table with a header, separated by commas, semicolons or tabs. The place of a row is its first line.

    Excel's first line ``sep=;`` names the separator. Where spaces follow the separators of the header, they are not
    part of the cells.

    Raises:
        DataError: If the header has a column twice.
    """
    csv.field_size_limit(LARGEST_CELL)
    # Bytes that are not UTF-8 become lone surrogates: their row gets an error, and later rows can be read.
    with io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
        skipped, first, delimiter = _table_start(text)
        spaces = f"{delimiter} " in first
        lines = chain([first], text)
        table = csv.reader(lines, delimiter=delimiter, strict=True, skipinitialspace=spaces)
        header: list[str] = []
        while True:
            place = RowLocation(name, skipped + table.line_num + 1)
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
                header = [cell.strip() for cell in cells]
                check_columns(header, name)
            elif cells:
                yield _table_row(place, header, cells)


def _table_start(text: io.TextIOWrapper) -> tuple[int, str, str]:
    """Return the number of lines before a table, its first line, and its separator."""
    skipped, first = 0, text.readline()
    while first and not first.strip():
        skipped, first = skipped + 1, text.readline()
    if named := SEPARATOR_LINE.fullmatch(first):
        return skipped + 1, text.readline(), named[1]
    return skipped, first, max(",;\t", key=first.count)


def check_columns(columns: Sequence[str], name: str) -> None:
    """Check that no column of a table has the name of another.

    Raises:
        DataError: If two have the same name.
    """
    twice = next((column for column, times in Counter(columns).items() if column and times > 1), None)
    if twice is not None:
        raise DataError(
            f'Cannot use {name}: it has the column "{shown(twice)}" twice.',
            expected="a name of its own for each column",
            fix="rename or remove one of them",
        )


def _table_row(place: RowLocation, header: list[str], cells: list[str]) -> SourceRow:
    if len(cells) != len(header):
        what = f"it has {len(cells)} fields, the header {len(header)} ({listing(header)})"
        return SourceRow(place, error=DataError(what, fix="put fields with separators or line breaks in quotes"))
    try:
        "".join(cells).encode()
    except UnicodeEncodeError:
        return SourceRow(place, error=DataError("it is not UTF-8", expected=UTF8, fix=TO_UTF8))
    return SourceRow(place, dict(zip(header, cells, strict=True)))


def read_parquet(path: Path, name: str, choose: ColumnChoice | None = None) -> Iterator[SourceRow]:
    """Read the rows of a Parquet table, a batch in memory at a time.

    Args:
        path: The file.
        name: Name of the file in error messages.
        choose: Chooses the columns to read; without it, all are read.
    """
    with pq.ParquetFile(path) as table:
        columns = table.schema_arrow.names
        needed = None if choose is None else [column for column in columns if column in choose(columns)]
        yield from read_arrow(table.iter_batches(batch_size=BATCH_ROWS, columns=needed), columns, name)


def read_arrow(batches: Iterable[pa.RecordBatch | pa.Table], columns: Sequence[str], name: str) -> Iterator[SourceRow]:
    """Turn batches of a table into rows.

    Args:
        batches: The batches, with all of the columns or some.
        columns: The table's columns. Those that the batches lack, and cells that Python cannot hold, become an
            `UnreadValue`.
        name: Name of the table in error messages.
    """
    check_columns(columns, name)
    number = 0
    for batch in batches:
        cells = {column: _cells(batch.column(column)) for column in batch.schema.names}
        for index in range(batch.num_rows):
            number += 1
            row = {column: cells[column][index] if column in cells else NOT_NEEDED for column in columns}
            yield SourceRow(RowLocation(name, number, "row"), row)


def _cells(column: pa.Array | pa.ChunkedArray) -> list[object]:
    try:
        return cast(list[object], column.to_pylist())
    except CELL_ERRORS:
        return [_cell(value) for value in column]


def _cell(value: pa.Scalar) -> object:
    try:
        return value.as_py()
    except CELL_ERRORS as error:
        return UnreadValue(str(error))


READERS: dict[str, Callable[[BinaryIO, str], Iterator[SourceRow]]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
}
KINDS = (*READERS, ".parquet")

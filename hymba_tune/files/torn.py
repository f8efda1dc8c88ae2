"""Reading files that a crash may have torn or filled with NUL characters."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T", dict[str, Any], list[Any])
UNREADABLE = (OSError, ValueError, RecursionError)
"""What reading a damaged JSON file raises."""


def read_json(path: Path, kind: type[T]) -> T | None:
    """Read a JSON file.

    Args:
        path: The file.
        kind: The type of its content, ``dict`` or ``list``.

    Returns:
        Its content; None if there is no such file, or it holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except UNREADABLE:
        return None
    return content if isinstance(content, kind) else None


def read_json_lines(path: Path) -> Iterator[dict[str, Any] | None]:
    """Read a file of JSON objects, one a line.

    An incomplete last line, as a killed process leaves it, is left out.

    Args:
        path: The file, which need not exist.

    Yields:
        Each object; None for a line that holds none.
    """
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        for line in file:
            # Some file systems fill a file with NUL characters when the power fails.
            if not (text := line.strip("\0 \r\n")) and "\0" not in line:
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError):
                if not line.endswith("\n"):
                    return
                row = None
            yield row if isinstance(row, dict) else None


def read_metrics(path: Path) -> tuple[list[dict[str, float]], int]:
    """Read a ``metrics.jsonl``.

    Returns:
        The numbers of each line by column, and the number of lines that cannot be read.
    """
    lines = list(read_json_lines(path))
    rows = [
        {name: value for name, value in line.items() if type(value) in (int, float)}
        for line in lines
        if line is not None and type(line.get("step")) is int
    ]
    return rows, len(lines) - len(rows)

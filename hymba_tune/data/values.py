"""The values of data files: their types in words, text that UTF-8 can encode, and JSON."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hymba_tune.errors import DataError

DEEPEST = 64
"""Levels of nesting above which JSON is refused; Python's own limit would end in a RecursionError far from here."""
SHOWN_CHARACTERS = 60
_BLANK = re.compile(r"\s*")
_TOO_DEEP = f"more than {DEEPEST} levels of nesting"


@dataclass(frozen=True, slots=True)
class UnreadValue:
    """A value that was not read from a table: its column is not needed, or Python has no such value.

    Attributes:
        why: The reason.
    """

    why: str

    def __str__(self) -> str:
        return f"({self.why})"


NOT_NEEDED = UnreadValue("its column is not needed")


def kind_of(value: object) -> str:
    """Name the type of a value in words."""
    if isinstance(value, UnreadValue):
        return f"a value that cannot be read ({value.why})"
    kinds = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list"}
    return kinds.get(type(value), "an object" if isinstance(value, Mapping) else f"a {type(value).__name__}")


def shown(value: object) -> str:
    """Show a value in a message, cut to a readable length."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"


def is_empty(value: object) -> bool:
    """Return whether a value says nothing. False and 0 do say something."""
    return value is None or (isinstance(value, str | list | dict) and not value)


def read_text(value: object, where: str) -> str:
    """Check that a value is text that UTF-8 can encode, and return it.

    Raises:
        DataError: If it is not.
    """
    if not isinstance(value, str):
        raise DataError(f"{where} is {kind_of(value)}", expected="text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(value[error.start]):04x}"
        raise DataError(f"{where} has half a character ({half})", expected="text in UTF-8") from None
    return value


def without_nulls(value: Any) -> Any:
    """Remove null values from objects: Arrow gives every object the same keys and fills the missing ones with null."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def parse_json(text: str) -> Any:
    """Parse JSON, with bounded nesting and without repeated keys.

    Raises:
        ValueError: If it is not JSON, or JSON that is not read.
    """
    try:
        return _bounded(_JSON.decode(text), text)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None


def parse_json_documents(text: str) -> list[Any]:
    """Parse JSON values that follow each other, each over any number of lines.

    Raises:
        ValueError: If `parse_json` raises it.
    """
    documents = []
    position = 0
    while (position := _next_character(text, position)) < len(text):
        begin = position
        try:
            document, position = _JSON.raw_decode(text, begin)
        except RecursionError:
            raise ValueError(_TOO_DEEP) from None
        documents.append(_bounded(document, text[begin:position]))
    return documents


def _next_character(text: str, position: int) -> int:
    blank = _BLANK.match(text, position)
    return blank.end() if blank else position


def parse_written(text: str) -> object:
    """Parse text as JSON, or as Python writes lists and objects, if it is either; else return the text itself.

    Tables without nested columns hold lists as such text.
    """
    try:
        return parse_json(text)
    except ValueError:
        pass
    if not text.lstrip().startswith(("[", "{")):
        return text
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text
    return value if isinstance(value, list | dict) else text


def _bounded(value: Any, text: str) -> Any:
    """Return the value if it is not nested too deeply; its text shows at once that most values are not."""
    if text.count("[") + text.count("{") <= DEEPEST:
        return value
    level = [value]
    for _ in range(DEEPEST):
        level = [
            item
            for outer in level
            if isinstance(outer, list | dict)
            for item in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return value
    raise ValueError(_TOO_DEEP)


def _without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        for key, value in pairs:
            if fields[key] != value:
                raise ValueError(f'the key "{shown(key)}" twice, with different values')
    return fields


_JSON = json.JSONDecoder(object_pairs_hook=_without_repeated_keys)

"""Looks at data without a tokenizer: its format, its size, and the verbs that can train on it."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np

from hymba_tune.data.formats import Conversation, Example, Names, judgment_column, parse, recognize
from hymba_tune.data.mixes import open_sources
from hymba_tune.data.preferences import FIELDS, parse_pair, parse_unpaired
from hymba_tune.data.rows import SourceRow
from hymba_tune.errors import DataError, command

PARSED = 2_000
"""Rows that are parsed; the others are only counted."""
TURN = 24
"""Bytes of a chat template around a message, about."""
MARK = "####"
"""The mark before the result of an answer of GSM8K."""
PAIRS = "pairs of a chosen and a rejected answer"
LABELED = "answers with a label"
VERBS = {PAIRS: ("dpo", "orpo", "kto", "reward"), LABELED: ("kto",), "text": ("sft",)}
"""The verbs that can train on a format, the usual one first; all other formats are conversations."""
WITH_ANSWERS = ("sft", "distill", "grpo")


@dataclass(frozen=True)
class DataSummary:
    """What data holds.

    Attributes:
        rows: The number of rows.
        bad_rows: Rows that cannot be used, among the first `PARSED`.
        problem: The first of their problems; empty if there is none.
        format: The format of most rows.
        mapping: Names of columns, as for ``--map``.
        row_bytes: Bytes of text that 99 % of the rows do not exceed.
        marked: Whether answers end with `MARK` and a result.
    """

    rows: int
    bad_rows: int
    problem: str
    format: str
    mapping: tuple[str, ...]
    row_bytes: int
    marked: bool

    @property
    def verbs(self) -> tuple[str, ...]:
        """The verbs that can train on it, the usual one first."""
        return VERBS.get(self.format, WITH_ANSWERS)


def summarize(data: Sequence[str], mapping: Mapping[str, str]) -> DataSummary:
    """Read data and summarize it.

    Args:
        data: Files, Hub datasets or ``demo``.
        mapping: Names of columns and roles. If it is empty, the names that an error message would propose are used.

    Raises:
        DataError: If it cannot be read, or no row can be used.
        ConfigError: If ``mapping`` names a field or role that does not exist.
    """
    sources = open_sources(data)
    rows = chain.from_iterable(sources)
    first = list(islice(rows, PARSED))
    mapping = dict(mapping) or _proposed(first)
    names = Names.parse(mapping, [*dict.fromkeys((*FIELDS, "text"))])

    formats: Counter[str] = Counter()
    sizes: list[int] = []
    marked = 0
    problems: list[str] = []
    for row in first:
        try:
            form, examples = _read(row, names)
        except DataError as error:
            problems.append(f"{row.place}: {error.what}")
            continue
        formats[form] += 1
        sizes += map(_size, examples)
        marked += all(isinstance(one, Conversation) and MARK in one.messages[-1].content for one in examples)
    if not formats:
        raise DataError(f"No row of {', '.join(data)} can be used. {problems[0]}.", fix=command("data", "check", *data))
    return DataSummary(
        len(first) + sum(1 for _ in rows),
        len(problems),
        problems[0] if problems else "",
        formats.most_common(1)[0][0],
        tuple(f"{name}={column}" for name, column in mapping.items()),
        int(np.quantile(sizes, 0.99)),
        marked > 0.9 * len(first),
    )


def _proposed(rows: Iterable[SourceRow]) -> dict[str, str]:
    """Return the names of columns that the error of the first row proposes, if they leave nothing open."""
    row = next((row for row in rows if isinstance(row.value, Mapping)), None)
    if row is None or not isinstance(row.value, Mapping):
        return {}
    label = judgment_column(row.value)
    own: dict[str, str] = {"label": label} if label and label != "label" else {}
    try:
        _read(row, Names(own))
    except DataError as error:
        words = shlex.split(error.details["to fix"])
        if words[::2] == ["--map"] * (len(words) // 2) and "COLUMN" not in " ".join(words):
            return own | dict(word.split("=", 1) for word in words[1::2])
    return own


def _read(row: SourceRow, names: Names) -> tuple[str, list[Example]]:
    """Return the format of a row and its texts.

    Raises:
        DataError: If it cannot be used.
    """
    if row.error:
        raise row.error
    value = row.value
    fields = names.rename(value) if isinstance(value, Mapping) else {}
    if fields.keys() >= {"chosen", "rejected"}:
        pair = parse_pair(value, names)
        return PAIRS, [pair.chosen, pair.rejected]
    if judgment_column(fields):
        return LABELED, [one.conversation for one in parse_unpaired(value, names)]
    return recognize(fields, names).name if isinstance(value, Mapping) else "", [parse(value, names)]


def _size(example: Example) -> int:
    if not isinstance(example, Conversation):
        return len(example.text.encode(errors="replace"))
    return sum(len(message.content.encode(errors="replace")) + TURN for message in example.messages)

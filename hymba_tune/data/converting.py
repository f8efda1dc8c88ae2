"""From one format to another, a row in memory at a time; what the other cannot hold is refused, never lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from hymba_tune.config import OnBadRow
from hymba_tune.data.duplicates import content_hash
from hymba_tune.data.encoding import read_example
from hymba_tune.data.formats import Conversation, Example, Names
from hymba_tune.data.messages import Message
from hymba_tune.data.report import Dropped
from hymba_tune.data.rows import RowError, SourceRow, listing
from hymba_tune.data.sources import Source
from hymba_tune.data.writers import Write, check_target, writing
from hymba_tune.errors import DataError

PROGRESS_ROWS = 1000
TEXT = pa.string()
BESIDE = {"tools": TEXT, "contexts": pa.list_(TEXT)}
"""Columns that every format of conversations has; in tables tools are JSON text, since no two have the same fields."""
SHAREGPT = {"user": "human", "assistant": "gpt"}


@dataclass(frozen=True)
class TargetFormat:
    """A format to write: its columns, and how an example becomes a row of them."""

    columns: Mapping[str, pa.DataType]
    row: Callable[[Example], dict[str, Any]]


def _conversation(example: Example) -> Conversation:
    if not isinstance(example, Conversation):
        raise DataError("it is plain text", expected="a conversation", fix="--to text")
    return example


def _text_row(example: Example) -> dict[str, Any]:
    if isinstance(example, Conversation):
        raise DataError("it is a conversation", expected="plain text, all of which is learned", fix="--to messages")
    return {"text": example.text}


def _messages_row(example: Example) -> dict[str, Any]:
    talk = _conversation(example)
    return {"messages": [_item("role", message.role, "content", message) for message in talk.messages], **_beside(talk)}


def _sharegpt_row(example: Example) -> dict[str, Any]:
    talk = _conversation(example)
    turns = [_item("from", SHAREGPT.get(message.role, message.role), "value", message) for message in talk.messages]
    return {"conversations": turns, **_beside(talk)}


def _item(role_key: str, role: str, content_key: str, message: Message) -> dict[str, Any]:
    item: dict[str, Any] = {role_key: role, content_key: message.content}
    return item if message.weight == 1 else {**item, "weight": message.weight}


def _completion_row(example: Example) -> dict[str, Any]:
    talk, system, question, answer = _one_turn(example)
    return {"prompt": question, "completion": answer, **system, **_beside(talk)}


def _alpaca_row(example: Example) -> dict[str, Any]:
    talk, system, question, answer = _one_turn(example)
    return {"instruction": question, "input": "", "output": answer, **system, **_beside(talk)}


def _one_turn(example: Example) -> tuple[Conversation, dict[str, str], str, str]:
    """What formats of one turn hold: at most one system message, a question, an answer."""
    talk = _conversation(example)
    roles = [message.role for message in talk.messages]
    if roles[-2:] != ["user", "assistant"] or roles[:-2] not in ([], ["system"]):
        raise DataError(
            f"it has {len(roles)} messages ({listing(roles)})",
            expected="one question and one answer, with at most one system message before",
            fix="--to messages",
        )
    contents = [message.content for message in talk.messages]
    return talk, {"system": contents[0]} if len(roles) > 2 else {}, contents[-2], contents[-1]


def _beside(talk: Conversation) -> dict[str, Any]:
    beside = {"tools": list(talk.tools), "contexts": list(talk.contexts)}
    return {name: value for name, value in beside.items() if value}


def _turn_list(*keys: str) -> pa.DataType:
    return pa.list_(pa.struct([*((key, TEXT) for key in keys), ("weight", pa.float64())]))


TARGETS: dict[str, TargetFormat] = {
    "messages": TargetFormat({"messages": _turn_list("role", "content"), **BESIDE}, _messages_row),
    "sharegpt": TargetFormat({"conversations": _turn_list("from", "value"), **BESIDE}, _sharegpt_row),
    "prompt-completion": TargetFormat({"prompt": TEXT, "completion": TEXT, "system": TEXT, **BESIDE}, _completion_row),
    "alpaca": TargetFormat({"instruction": TEXT, "input": TEXT, "output": TEXT, "system": TEXT, **BESIDE}, _alpaca_row),
    "text": TargetFormat({"text": TEXT}, _text_row),
}


@dataclass
class Converted:
    """How many rows were written, were left out and listed, and said the same as an earlier one."""

    rows: int = 0
    left_out: int = 0
    repeated: int = 0


def convert(
    sources: Sequence[Source],
    to: str,
    out: Path,
    *,
    mapping: Mapping[str, str] | None = None,
    on_bad_row: OnBadRow = OnBadRow.stop,
    unique: bool = False,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Converted:
    """Write the rows of the sources in another format.

    Args:
        sources: Read one after the other.
        to: One of `TARGETS`.
        out: The file; its ending says the kind. With ``skip``, rows left out are listed in ``OUT.dropped.jsonl``.
        mapping: ``--map``: see `Names.parse`.
        on_bad_row: What happens at a row that cannot be read, or that the format cannot hold.
        unique: Whether rows that say the same as an earlier one are left out. Takes about 70 bytes a row.
        overwrite: Whether files that are there are replaced.
        progress: Called with the number of rows written, now and then.

    Raises:
        RowError: At the first such row, if ``on_bad_row`` is ``stop``; nothing is written then.
        DataError: If a source cannot be read.
        ConfigError: If ``out`` cannot be written.
    """
    check_converted(out, on_bad_row=on_bad_row, overwrite=overwrite)
    target, done = TARGETS[to], Converted()
    listed = _listed(out)
    with ExitStack() as files:
        write = files.enter_context(writing(out, target.columns, overwrite=overwrite))
        leave_out: Write | None = None
        if on_bad_row is OnBadRow.skip and listed.exists():  # of the file that is replaced
            leave_out = files.enter_context(writing(listed, {}, overwrite=overwrite))
        seen: set[int] = set()
        for row, example, converted in _attempts(sources, target, mapping or {}):
            if isinstance(converted, DataError):
                if on_bad_row is OnBadRow.stop:
                    raise RowError(row.place, converted, extent=f"lists such rows in {listed.name}")
                leave_out = leave_out or files.enter_context(writing(listed, {}, overwrite=overwrite))
                done.left_out += 1
                leave_out(Dropped(row.place, "bad row", converted.what).as_row())
                continue
            if unique and example:
                content = content_hash(example)
                if content in seen:
                    done.repeated += 1
                    continue
                seen.add(content)
            write(converted)
            done.rows += 1
            if progress and done.rows % PROGRESS_ROWS == 0:
                progress(done.rows)
    return done


def check_converted(
    out: Path, *, on_bad_row: OnBadRow = OnBadRow.stop, overwrite: bool = False, inputs: Sequence[Path] = ()
) -> None:
    """Check that `convert` can write a file, and the list of rows left out beside it.

    Args:
        out: The file.
        on_bad_row: Whether there will be such a list.
        overwrite: Whether files that are there are replaced.
        inputs: The files that are read.

    Raises:
        DataError: If the ending is not known.
        ConfigError: If it cannot.
    """
    for path in [out, *([_listed(out)] if on_bad_row is OnBadRow.skip else [])]:
        check_target(path, overwrite=overwrite, inputs=inputs)


def _listed(out: Path) -> Path:
    return out.with_name(f"{out.name}.dropped.jsonl")


def _attempts(
    sources: Sequence[Source], target: TargetFormat, mapping: Mapping[str, str]
) -> Iterator[tuple[SourceRow, Example | None, dict[str, Any] | DataError]]:
    """Every row, what it says, and that in the target's format, or why not."""
    for source in sources:
        names = Names.parse({**mapping, **source.mapping})
        for row in source:
            example = None
            try:
                example = read_example(row, names)
                yield row, example, target.row(example)
            except DataError as problem:
                yield row, example, problem

"""Converts data between formats, a row in memory at a time. Content that the target cannot hold is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from hymba_tune.config import OnBadRow
from hymba_tune.data.duplicates import content_hash
from hymba_tune.data.encoding import read_example
from hymba_tune.data.formats import Conversation, Example, Names, needed_columns
from hymba_tune.data.messages import Message
from hymba_tune.data.report import Dropped
from hymba_tune.data.rows import RowError, SourceRow, listing
from hymba_tune.data.sources import Source
from hymba_tune.data.writers import Write, check_target, writing
from hymba_tune.errors import DataError

PROGRESS_ROWS = 1000
TEXT = pa.string()
EXTRAS = {"tools": TEXT, "contexts": pa.list_(TEXT)}
"""Columns that every format of conversations has. In tables, tools are JSON text, since their fields differ."""
SHAREGPT = {"user": "human", "assistant": "gpt"}


@dataclass(frozen=True)
class TargetFormat:
    """A format to write.

    Attributes:
        columns: Columns and their types in Parquet.
        row: Turns an example into a row; raises `DataError` if the format cannot hold it.
    """

    columns: Mapping[str, pa.DataType]
    row: Callable[[Example], dict[str, Any]]


def _conversation(example: Example) -> Conversation:
    if not isinstance(example, Conversation):
        raise DataError("it is plain text", expected="a conversation", fix="--to text")
    return example


def _text_row(example: Example) -> dict[str, Any]:
    if isinstance(example, Conversation):
        raise DataError("it is a conversation", expected="plain text with loss on all of it", fix="--to messages")
    return {"text": example.text}


def _messages_row(example: Example) -> dict[str, Any]:
    conversation = _conversation(example)
    items = [_item("role", message.role, "content", message) for message in conversation.messages]
    return {"messages": items, **_extra_columns(conversation)}


def _sharegpt_row(example: Example) -> dict[str, Any]:
    conversation = _conversation(example)
    items = [_item("from", SHAREGPT.get(m.role, m.role), "value", m) for m in conversation.messages]
    return {"conversations": items, **_extra_columns(conversation)}


def _item(role_key: str, role: str, content_key: str, message: Message) -> dict[str, Any]:
    item: dict[str, Any] = {role_key: role, content_key: message.content}
    return item if message.weight == 1 else {**item, "weight": message.weight}


def _completion_row(example: Example) -> dict[str, Any]:
    conversation, system, question, answer = _one_turn(example)
    return {"prompt": question, "completion": answer, **system, **_extra_columns(conversation)}


def _alpaca_row(example: Example) -> dict[str, Any]:
    conversation, system, question, answer = _one_turn(example)
    return {"instruction": question, "input": "", "output": answer, **system, **_extra_columns(conversation)}


def _one_turn(example: Example) -> tuple[Conversation, dict[str, str], str, str]:
    """Take a conversation of one turn apart: itself, its system message as a column, its question and its answer."""
    conversation = _conversation(example)
    roles = [message.role for message in conversation.messages]
    if roles[-2:] != ["user", "assistant"] or roles[:-2] not in ([], ["system"]):
        raise DataError(
            f"it has {len(roles)} messages ({listing(roles)})",
            expected="one question and one answer, with at most one system message before",
            fix="--to messages",
        )
    contents = [message.content for message in conversation.messages]
    system = {"system": contents[0]} if len(roles) > 2 else {}
    return conversation, system, contents[-2], contents[-1]


def _extra_columns(conversation: Conversation) -> dict[str, Any]:
    extra = {"tools": list(conversation.tools), "contexts": list(conversation.contexts)}
    return {name: value for name, value in extra.items() if value}


def _turn_list(*keys: str) -> pa.DataType:
    return pa.list_(pa.struct([*((key, TEXT) for key in keys), ("weight", pa.float64())]))


TARGETS: dict[str, TargetFormat] = {
    "messages": TargetFormat({"messages": _turn_list("role", "content"), **EXTRAS}, _messages_row),
    "sharegpt": TargetFormat({"conversations": _turn_list("from", "value"), **EXTRAS}, _sharegpt_row),
    "prompt-completion": TargetFormat({"prompt": TEXT, "completion": TEXT, "system": TEXT, **EXTRAS}, _completion_row),
    "alpaca": TargetFormat({"instruction": TEXT, "input": TEXT, "output": TEXT, "system": TEXT, **EXTRAS}, _alpaca_row),
    "text": TargetFormat({"text": TEXT}, _text_row),
}


@dataclass
class Converted:
    """Counts of converted rows.

    Attributes:
        rows: Rows written.
        left_out: Rows that cannot be converted; they are listed in a file.
        repeated: Rows left out because an earlier row has the same content.
    """

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
        sources: The sources, read one after the other.
        to: Name of the target format, one of `TARGETS`.
        out: The file to write; its ending decides the file type. With ``skip``, rows left out are listed in
            ``OUT.dropped.jsonl``.
        mapping: Column and role names, as for `Names.parse`.
        on_bad_row: What to do with a row that cannot be read, or that the format cannot hold.
        unique: Whether to leave out rows with the same content as an earlier row. Takes about 70 bytes per row.
        overwrite: Whether existing files are replaced.
        progress: Called with the number of rows written so far, at intervals.

    Raises:
        RowError: At the first row that cannot be converted, if ``on_bad_row`` is ``stop``. Nothing is written then.
        DataError: If a source cannot be read.
        ConfigError: If ``out`` cannot be written.
    """
    check_converted(out, on_bad_row=on_bad_row, overwrite=overwrite)
    target = TARGETS[to]
    done = Converted()
    listed = _listed(out)
    with ExitStack() as files:
        write = files.enter_context(writing(out, target.columns, overwrite=overwrite))
        leave_out: Write | None = None
        if on_bad_row is OnBadRow.skip and listed.exists():  # it belongs to the file that is replaced
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
    """Check that `convert` can write a file, and the list of rows that it leaves out.

    Args:
        out: The file.
        on_bad_row: What to do with a row that cannot be used; only ``skip`` writes the list.
        overwrite: Whether existing files are replaced.
        inputs: The files that are read.

    Raises:
        DataError: If the ending is unknown.
        ConfigError: If a file cannot be written.
    """
    for path in [out, *([_listed(out)] if on_bad_row is OnBadRow.skip else [])]:
        check_target(path, overwrite=overwrite, inputs=inputs)


def _listed(out: Path) -> Path:
    return out.with_name(f"{out.name}.dropped.jsonl")


def _attempts(
    sources: Sequence[Source], target: TargetFormat, mapping: Mapping[str, str]
) -> Iterator[tuple[SourceRow, Example | None, dict[str, Any] | DataError]]:
    """Yield every row, its example, and the example in the target's format or the error that prevents it."""
    for source in sources:
        names = Names.parse({**mapping, **source.mapping})
        for row in source.only(partial(needed_columns, names)):
            example = None
            try:
                example = read_example(row, names)
                yield row, example, target.row(example)
            except DataError as problem:
                yield row, example, problem

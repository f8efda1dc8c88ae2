from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from hymba_tune.config import OnBadRow
from hymba_tune.data import Conversation, Message, RowError, open_source
from hymba_tune.data.converting import TARGETS, convert
from hymba_tune.data.formats import Text, parse
from hymba_tune.errors import ConfigError, DataError
from tests.data.inputs import source
from tests.data.small_tokenizers import turns

ONE_TURN = [
    {"prompt": 'Say "hi",\nplease; 漢字 😀', "completion": "hi,\n\thi"},
    {
        "prompt": "Sum?",
        "completion": "3",
        "system": "Be brief.",
        "tools": [{"name": "add", "x": None}],
        "contexts": ["c"],
    },
]
MANY_TURNS = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Sum?"},
        {"role": "assistant", "content": "add(1, 2)", "weight": 0},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "3"},
    ],
    "tools": [{"name": "add", "parameters": {"a": 1}}],
    "contexts": ["One.", "Two."],
}
ENDINGS = ("jsonl", "ndjson", "json", "csv", "tsv", "parquet", "jsonl.gz", "csv.gz", "json.gz")


def examples(path: Path) -> list[object]:
    return [parse(row.value) for row in open_source(str(path))]


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("to", [name for name in TARGETS if name != "text"])
def test_conversations_survive_every_format_and_file_type(to: str, ending: str, tmp_path: Path) -> None:
    rows: list[Any] = [*ONE_TURN, *([MANY_TURNS] if to in ("messages", "sharegpt") else [])]
    out = tmp_path / f"a.{ending}"
    assert convert([source(rows)], to, out).rows == len(rows)
    assert examples(out) == [parse(row) for row in rows]
    assert [file.name for file in tmp_path.iterdir()] == [out.name]


@pytest.mark.parametrize("ending", ENDINGS)
def test_texts_survive_every_file_type(ending: str, tmp_path: Path) -> None:
    rows = [{"text": 'a "quoted", line\nand 漢字'}, {"text": " b "}] * 3
    convert([source(rows)], "text", tmp_path / f"a.{ending}")
    assert examples(tmp_path / f"a.{ending}") == [Text(row["text"]) for row in rows]


@pytest.mark.parametrize("weight", [0.25, 1])
def test_weights_survive_parquet(weight: float, tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello", "weight": weight}]}
    ]
    convert([source(rows)], "messages", tmp_path / "a.parquet")
    (example,) = examples(tmp_path / "a.parquet")
    assert isinstance(example, Conversation)
    assert example.messages[1].weight == weight


def test_weight_of_zero_survives(tmp_path: Path) -> None:
    convert([source([MANY_TURNS])], "sharegpt", tmp_path / "a.jsonl")
    (row,) = (json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines())
    assert row["conversations"][2] == {"from": "gpt", "value": "add(1, 2)", "weight": 0}


@pytest.mark.parametrize(
    ("to", "row", "message"),
    [
        ("alpaca", MANY_TURNS, r"it has 5 messages \(system, user, assistant, tool, assistant\)(.|\n)*--to messages"),
        ("prompt-completion", {"text": "x"}, r"it is plain text(.|\n)*--to text"),
        ("text", ONE_TURN[0], r"it is a conversation(.|\n)*--to messages"),
        ("messages", {"prompt": "x"}, 'it has no "completion"'),
    ],
)
def test_row_that_the_format_cannot_hold_is_an_error(to: str, row: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(RowError, match=rf"support\.jsonl, line 1: {message}"):
        convert([source([row])], to, tmp_path / "a.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_skipped_rows_are_left_out_and_listed(tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    done = convert([source([MANY_TURNS, ONE_TURN[0], {"text": "x"}])], "alpaca", out, on_bad_row=OnBadRow.skip)
    assert (done.rows, done.left_out) == (1, 2)
    assert len(examples(out)) == 1
    listed = [json.loads(line) for line in (tmp_path / "a.jsonl.dropped.jsonl").read_text().splitlines()]
    assert [(row["line"], row["reason"]) for row in listed] == [(1, "bad row"), (3, "bad row")]
    assert "it has 5 messages" in listed[0]["what"]


def test_unique_leaves_out_repeated_rows(tmp_path: Path) -> None:
    rows = [ONE_TURN[0], ONE_TURN[1], {"instruction": ONE_TURN[0]["prompt"], "output": ONE_TURN[0]["completion"]}]
    assert convert([source(rows)], "messages", tmp_path / "all.jsonl").rows == 3
    done = convert([source(rows)], "messages", tmp_path / "once.jsonl", unique=True)
    assert (done.rows, done.repeated) == (2, 1)


def test_mapping_applies_and_progress_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hymba_tune.data.converting.PROGRESS_ROWS", 2)
    rows = [{"q": str(number), "a": "x"} for number in range(5)]
    seen: list[int] = []
    mapping = {"prompt": "q", "completion": "a"}
    convert([source(rows)], "messages", tmp_path / "a.jsonl", mapping=mapping, progress=seen.append)
    assert examples(tmp_path / "a.jsonl")[4] == Conversation(turns("4", "x"))
    assert seen == [2, 4]


def test_parquet_is_written_in_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hymba_tune.data.writers.PARQUET_ROWS", 2)
    convert([source([{"text": str(number)} for number in range(5)])], "text", tmp_path / "a.parquet")
    assert examples(tmp_path / "a.parquet") == [Text(str(number)) for number in range(5)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.docx", r"its ending is unknown(.|\n)*\.jsonl"),
        ("a.parquet.gz", "its ending is unknown"),
        ("there.jsonl", r"--out .* exists\.\n.*--overwrite"),
        ("no/a.jsonl", r"there is no folder .*/no(.|\n)*mkdir -p"),
    ],
)
def test_target_is_checked_before_sources_are_read(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "there.jsonl").write_text("mine")
    with pytest.raises((DataError, ConfigError), match=message):
        convert([source([7])], "messages", tmp_path / name)
    assert (tmp_path / "there.jsonl").read_text() == "mine"


def test_full_disk_is_an_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(ConfigError, match=r"--out .*a\.jsonl: its disk is full"):
        convert([source(ONE_TURN)], "messages", tmp_path / "a.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_list_of_rows_left_out_replaces_nothing(tmp_path: Path) -> None:
    """A list of an earlier conversion, or a file of the user with that name, is not removed."""
    listed = tmp_path / "a.jsonl.dropped.jsonl"
    listed.write_text("mine")
    convert([source(ONE_TURN)], "messages", tmp_path / "a.jsonl")
    assert listed.read_text() == "mine"
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"dropped\.jsonl exists"):
        convert([source([*ONE_TURN, 7])], "messages", tmp_path / "a.jsonl", on_bad_row=OnBadRow.skip)
    done = convert([source(ONE_TURN)], "messages", tmp_path / "a.jsonl", on_bad_row=OnBadRow.skip, overwrite=True)
    assert (done.left_out, listed.read_text()) == (0, "")


def test_empty_messages_survive(tmp_path: Path) -> None:
    conversation = Conversation((Message("user", ""), Message("assistant", "Hello")))
    row = {"messages": [{"role": message.role, "content": message.content} for message in conversation.messages]}
    convert([source([row])], "messages", tmp_path / "a.csv")
    assert examples(tmp_path / "a.csv") == [conversation]

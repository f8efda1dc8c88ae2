"""Data files that crash readers, or hold nothing that can be learned."""

from __future__ import annotations

import gzip
import io
import json
import struct
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.hostile.trying import Attempt, check

pytestmark = pytest.mark.end_to_end

GOOD = b'{"prompt": "One?", "completion": "Two."}\n'
DEEP = "[" * 100_000 + "]" * 100_000
TALK: list[dict[str, Any]] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def row(**columns: Any) -> bytes:
    """A line of a JSON Lines file."""
    return json.dumps(columns).encode() + b"\n"


def messages(*parts: Any) -> bytes:
    """A row with these messages."""
    return row(messages=list(parts))


USER = {"role": "user", "content": "Hello?"}
ANSWER = {"role": "assistant", "content": "Hello."}
FILES: dict[str, bytes] = {
    "empty.jsonl": b"",
    "blank.jsonl": b"\n\n \n",
    "nul.jsonl": b"\0" * 1000,
    "random.jsonl": bytes(range(256)) * 4,
    "html.jsonl": b"<!DOCTYPE html><html><body>404</body></html>",
    "lfs.jsonl": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    "cut.jsonl": GOOD + b'{"prompt": "One?", "compl',
    "comma.jsonl": b'{"prompt": "a", "completion": "b"},\n',
    "single-quotes.jsonl": b"{'prompt': 'a', 'completion': 'b'}\n",
    "python.jsonl": b'{"prompt": None, "completion": True}\n',
    "list.jsonl": b"[1, 2, 3]\n",
    "numbers.jsonl": b"1\n2\n3\n",
    "texts.jsonl": b'"hello"\n"you"\n',
    "nulls.jsonl": b"null\nnull\n",
    "nan.jsonl": b'{"prompt": NaN, "completion": "b"}\n',
    "huge-number.jsonl": b'{"prompt": ' + b"9" * 5000 + b', "completion": "b"}\n',
    "deep.jsonl": b'{"prompt": "a", "completion": ' + DEEP.encode() + b"}\n",
    "deep-open.jsonl": b'{"prompt": "a", "completion": ' + b"[" * 100_000,
    "deep-maps.jsonl": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "duplicate-keys.jsonl": b'{"prompt": "a", "prompt": "c", "completion": "b"}\n',
    "latin-1.jsonl": '{"prompt": "é", "completion": "ü"}\n'.encode("latin-1"),
    "utf-16.jsonl": '{"prompt": "a", "completion": "b"}\n'.encode("utf-16"),
    "lone-surrogate.jsonl": b'{"prompt": "\\ud800", "completion": "\\udfff"}\n',
    "control.jsonl": b'{"prompt": "a\x01b", "completion": "b"}\n',
    "wrong-columns.jsonl": row(foo="a", bar="b"),
    "empty-row.jsonl": b"{}\n",
    "empty-texts.jsonl": row(prompt="", completion=""),
    "empty-answer.jsonl": row(prompt="a", completion=""),
    "blank-answer.jsonl": row(prompt="a", completion="   "),
    "number-answer.jsonl": row(prompt="a", completion=3),
    "list-answer.jsonl": row(prompt="a", completion=[1]),
    "null-answer.jsonl": row(prompt="a", completion=None),
    "map-answer.jsonl": row(prompt="a", completion={"text": "b"}),
    "no-messages.jsonl": messages(),
    "null-messages.jsonl": row(messages=None),
    "text-messages.jsonl": row(messages="hello"),
    "number-messages.jsonl": messages(1, 2),
    "null-message.jsonl": messages(None),
    "no-role.jsonl": messages({"content": "a"}, ANSWER),
    "no-content.jsonl": messages(USER, {"role": "assistant"}),
    "null-content.jsonl": messages(USER, {"role": "assistant", "content": None}),
    "number-content.jsonl": messages(USER, {"role": "assistant", "content": 3}),
    "unknown-role.jsonl": messages({"role": "wizard", "content": "a"}, ANSWER),
    "number-role.jsonl": messages({"role": 1, "content": "a"}, ANSWER),
    "list-role.jsonl": messages({"role": ["user"], "content": "a"}, ANSWER),
    "only-user.jsonl": messages(USER),
    "only-system.jsonl": messages({"role": "system", "content": "a"}),
    "image-part.jsonl": messages({"role": "user", "content": [{"type": "image", "url": "x"}]}, ANSWER),
    "unknown-part.jsonl": messages({"role": "user", "content": [{"type": "smell"}]}, ANSWER),
    "number-part.jsonl": messages({"role": "user", "content": [3]}, ANSWER),
    "tool-list-arguments.jsonl": messages(
        USER,
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]},
    ),
    "tool-torn-arguments.jsonl": messages(
        USER,
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": '{"a": '}}]},
    ),
    "tool-no-name.jsonl": messages(USER, {"role": "assistant", "content": "", "tool_calls": [{"function": {}}]}),
    "tool-text.jsonl": messages(USER, {"role": "assistant", "content": "", "tool_calls": "f(x)"}),
    "tools-number.jsonl": row(messages=TALK, tools=3),
    "tools-text.jsonl": row(messages=TALK, tools="not json"),
    "sharegpt-no-value.jsonl": row(conversations=[{"from": "human"}, {"from": "gpt"}]),
    "sharegpt-unknown.jsonl": row(conversations=[{"from": "elf", "value": "a"}, {"from": "gpt", "value": "b"}]),
    "sharegpt-number.jsonl": row(conversations=[{"from": "human", "value": 1}, {"from": "gpt", "value": "b"}]),
    "alpaca-number.jsonl": row(instruction=1, input=2, output=3),
    "alpaca-empty.jsonl": row(instruction="a", input="", output=""),
    "text-empty.jsonl": row(text=""),
    "text-number.jsonl": row(text=3),
    "text-list.jsonl": row(text=["a"]),
    "weight-nan.jsonl": b'{"messages": [{"role": "user", "content": "a"}, '
    b'{"role": "assistant", "content": "b", "weight": NaN}]}\n',
    "weight-text.jsonl": messages(USER, ANSWER | {"weight": "much"}),
    "weight-negative.jsonl": messages(USER, ANSWER | {"weight": -1}),
    "pairs-equal.jsonl": row(prompt="a", chosen="b", rejected="b"),
    "pairs-empty.jsonl": row(prompt="a", chosen="", rejected=""),
    "pairs-number.jsonl": row(prompt="a", chosen=1, rejected=2),
    "pairs-null.jsonl": row(prompt="a", chosen=None, rejected="b"),
    "label-text.jsonl": row(prompt="a", completion="b", label="perhaps"),
    "label-number.jsonl": row(prompt="a", completion="b", label=7),
    "label-null.jsonl": row(prompt="a", completion="b", label=None),
    "label-nan.jsonl": b'{"prompt": "a", "completion": "b", "label": NaN}\n',
    "number.json": b"3",
    "text.json": b'"hello"',
    "null.json": b"null",
    "empty.json": b"",
    "empty-list.json": b"[]",
    "empty-map.json": b"{}",
    "numbers.json": b"[1, 2]",
    "cut.json": b'[{"prompt": "a", "completion": "b"}, {"prom',
    "trailing.json": b'[{"prompt": "a", "completion": "b"}] trailing',
    "deep.json": DEEP.encode(),
    "empty.csv": b"",
    "header.csv": b"prompt,completion\n",
    "ragged.csv": b"prompt,completion\na,b,c,d\n",
    "short.csv": b"prompt,completion\na\n",
    "quote.csv": b'prompt,completion\n"a,b\n',
    "nul.csv": b"prompt,completion\na\0b,c\n",
    "semicolons.csv": b"foo;bar\na;b\n",
    "long-field.csv": b"prompt,completion\na," + b"x" * 200_000 + b"\n",
    "same-names.csv": b"prompt,prompt\na,b\n",
    "latin.csv": "prompt,completion\né,".encode("latin-1") + b"\n",
    "empty.tsv": b"",
    "columns.tsv": b"foo\tbar\na\tb\n",
    "empty.parquet": b"",
    "magic.parquet": b"PAR1PAR1",
    "text.parquet": GOOD,
    "lying.parquet": b"PAR1" + b"\0" * 100 + struct.pack("<I", 2**31) + b"PAR1",
    "gzip.jsonl.gz": b"not gzip",
    "cut.jsonl.gz": gzip.compress(GOOD * 1000)[:-30],
    "unknown.txt": b"hello",
    "weights.safetensors": b"\0" * 100,
    "pickle.pkl": b"\x80\x04]\x94.",
    "archive.zip": b"PK\x03\x04",
    "mix.yaml": b"- nonsense",
    "mix-deep.yaml": ("sources: " + "[" * 5000 + "]" * 5000).encode(),
    "mix-number.yaml": b"3",
    "mix-self.yaml": b"sources:\n- path: mix-self.yaml\n",
}


def parquet(**columns: Any) -> bytes:
    """A Parquet file with these columns."""
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file)
    return file.getvalue()


PARQUET: dict[str, dict[str, Any]] = {
    "integers": {"prompt": [1], "completion": [2]},
    "binary": {"prompt": [b"\xff\xfe"], "completion": [b"\xff"]},
    "nulls": {"prompt": pa.nulls(2), "completion": pa.nulls(2)},
    "no-rows": {"prompt": pa.array([], pa.string()), "completion": pa.array([], pa.string())},
    "other-columns": {"foo": ["a"]},
    "far-date": {"prompt": pa.array([2**62], pa.timestamp("us")), "completion": ["b"]},
    "unknown-zone": {"prompt": pa.array([0], pa.timestamp("us", tz="Mars/Base")), "completion": ["b"]},
    "lists": {"messages": [[["user", "a"], ["assistant", "b"]]]},
}
QUIET = {
    "duplicate-keys.jsonl": "twice|duplicate",
    "long-field.csv": "long|tokens|cut",
    "same-names.csv": "(?i)column|bad|cannot",
    "nul.csv": "1 row",
    "label-null.jsonl": "label is null",
    **dict.fromkeys(("label-text.jsonl", "label-number.jsonl", "label-nan.jsonl"), r"label \(1\)|not shown"),
}
"""Files that may be used, and what is then said of them."""


def test_files_that_cannot_be_learned_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # a long name would be cut in tables
    files = {**FILES, **{f"{name}.parquet": parquet(**columns) for name, columns in PARQUET.items()}}
    attempts = []
    for name, content in files.items():
        Path(name).write_bytes(content)
        words = ["data", "check", name, "--model", "hymba-nano"]
        says = QUIET.get(name, name.split(".")[0])
        attempts.append((name, Attempt(words, says, refused=name not in QUIET)))
    check(attempts, capsys)


def test_paths_that_are_no_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "nowhere.jsonl").symlink_to(tmp_path / "gone.jsonl")
    (tmp_path / "circle.jsonl").symlink_to(tmp_path / "circle.jsonl")
    (tmp_path / "empty").mkdir()
    names = (
        "folder.jsonl",
        "nowhere.jsonl",
        "circle.jsonl",
        "empty",
        "gone/rows.jsonl",
        "a\nb.jsonl",
        "a\x1b[31m.jsonl",
    )
    attempts = [
        (repr(name), Attempt([*verb, str(tmp_path / name), "--model", "hymba-nano"], "(?i)cannot|no |not "))
        for name in names
        for verb in (["data", "check"], ["data", "preview"], ["sft", "--data"])
    ]
    check(attempts, capsys)

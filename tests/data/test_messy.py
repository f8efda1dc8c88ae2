"""Files with real-world defects: each can be trained on, or gives an error that names the defect."""

from __future__ import annotations

import gzip
import io
import json
import os
import zipfile
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from hymba_tune.checkpoint import load_tokenizer
from hymba_tune.config import OnBadRow
from hymba_tune.data import Text, build_dataset, encode, open_source, with_chat_template
from hymba_tune.data.checking import check_sources
from hymba_tune.data.readers import unreadable
from hymba_tune.errors import DataError
from hymba_tune.registry import resolve_model

TALK = {"messages": [{"role": "user", "content": "Hi 😀 漢字"}, {"role": "assistant", "content": "Hello 👩‍👩‍👧"}]}
GOOD = json.dumps(TALK, ensure_ascii=False).encode()


@pytest.fixture(scope="module")
def nano() -> PreTrainedTokenizerFast:
    return with_chat_template(load_tokenizer(resolve_model("hymba-nano").folder))


def answer(text: str) -> bytes:
    return json.dumps({"prompt": "Hi", "completion": text}).encode()


BAD = {
    json.dumps({"messages": [TALK["messages"][0], {"role": "bot", "content": "x"}]}).encode(): "has role",
    b'{"messages": [': "not JSON at column 15",
    b"<html>": "not JSON at column 1",
    answer(""): "is an empty answer",
    b'{"question": "x", "answer": "y"}': "match no format",
    json.dumps({"messages": TALK["messages"][1:]}).encode(): "it has an answer but no question",
    b'{"prompt": "\\ud83d", "completion": "y"}': "has half a character",
    b'{"prompt": "\xe9", "completion": "y"}': "is not UTF-8",
    b'{"prompt": "x\x00", "completion": "y"}': "not JSON at column 14",
    b"\x00\x00": "not JSON at column 1",
    b'{"a": ' + b"[" * 10_000 + b"]" * 10_000 + b"}": "JSON that cannot be read",
    b"[1, 2]": "the row is a list",
}
"""Bad lines and their errors."""


def test_each_bad_line_of_a_file_has_its_error_and_the_rest_is_encoded(
    nano: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hymba_tune.data.check_counts.EXAMPLES", 9)
    odd = [answer("a\u0000b\u001b[31m"), answer("\ufeff\u200b zero width"), answer("\\ud83d as text")]
    path = tmp_path / "messy.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join([GOOD, b"", *BAD, b"  ", *odd, GOOD]) + b"\r\n")
    result = check_sources([open_source(str(path))], nano, max_length=256)
    examples = [example for problem in result.problems.values() for example in problem.examples]
    for number, message in enumerate(BAD.values(), start=3):
        assert [text for text in examples if text.startswith(f"{path}, line {number}: ") and message in text], message
    assert (result.rows, result.bad_rows) == (5 + len(BAD), len(BAD))
    dataset, report = build_dataset([open_source(str(path))], nano, max_length=256, on_bad_row=OnBadRow.skip)
    assert (len(dataset), report.bad_rows) == (5, len(BAD))
    assert nano.decode(dataset[0]["input_ids"]).rstrip().endswith("Hello 👩‍👩‍👧</s>")
    with pytest.raises(
        DataError, match=r'messy\.jsonl, line 3: message 2 has role "bot"(.|\n)*12 such rows in the file'
    ):
        build_dataset([open_source(str(path))], nano, max_length=256)


def test_row_of_two_megabytes_loses_no_token(hymba: PreTrainedTokenizerFast) -> None:
    rows = encode(Text("answer " * 280_000 + "😀" * 10_000), hymba, 2048)
    assert {len(row.input_ids) for row in rows[:-1]} == {2048}
    ids = [token for row in rows for token in row.input_ids]
    assert ids.count(hymba.convert_tokens_to_ids("<0xF0>")) == 10_000  # the first byte of each emoji
    assert ids[-1] == hymba.eos_token_id


def zipped() -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a.jsonl", GOOD)
    return archive.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", b"", "it has no rows"),
        (
            "cut.jsonl.gz",
            gzip.compress(GOOD * 99)[:-9],
            r"Cannot read .*cut\.jsonl\.gz: (.|\n)*check that the file is complete",
        ),
        ("zip.jsonl", zipped(), r"Cannot read .*zip\.jsonl: it is a zip archive"),
        ("zip.jsonl.gz", zipped(), "it is a zip archive"),
        ("a.jsonl", b"\xfd7zXZ\x00\x00", "it is xz"),
        ("a.jsonl", b"BZh91AY", "it is bzip2"),
        ("a.jsonl.gz", b"\x28\xb5\x2f\xfd\x04", "it is Zstandard"),
        ("a.csv", b"PAR1\x15\x04", r"it is Parquet(.|\n)*name a Parquet file \.parquet"),
        ("a.parquet", GOOD, r"Cannot read .*a\.parquet"),
    ],
    # The contents hold the time at which they were compressed, which differs between processes of a test run.
    ids=["empty", "cut", "zip", "zip.gz", "xz", "bzip2", "Zstandard", "Parquet", "not Parquet"],
)
def test_file_of_another_type_is_named(
    name: str, content: bytes, message: str, nano: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        build_dataset([open_source(str(tmp_path / name))], nano, max_length=64)


def test_text_with_the_ending_gz_is_read(nano: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(GOOD)
    assert len(build_dataset([open_source(str(tmp_path / "a.jsonl.gz"))], nano, max_length=64)[0]) == 1


def test_folder_and_pipe_are_refused_before_they_are_opened(tmp_path: Path) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(DataError, match=r"folder\.jsonl: it is a folder"):
        open_source(str(tmp_path / "folder.jsonl"))
    for name in (str(tmp_path / "pipe.jsonl"), "/dev/null"):
        with pytest.raises(DataError, match=r"it is a pipe or a device(.|\n)*save it as a file"):
            open_source(name)


def test_file_without_permission_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD)

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)  # root, who may run the tests, can read everything
    source = open_source(str(tmp_path / "a.jsonl"))
    assert source.content is not None
    with pytest.raises(DataError, match=r"a\.jsonl: permission denied\.(.|\n)*chmod u\+r"):
        list(source)
    with pytest.raises(DataError, match=r"a\.jsonl: permission denied"):
        source.content()
    assert "No such file" in str(unreadable("a", FileNotFoundError(2, "No such file")))

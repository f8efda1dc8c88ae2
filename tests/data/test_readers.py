from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hymba_tune.data import SourceRow, open_source
from hymba_tune.errors import DataError

ROWS = [
    {"prompt": "What?", "completion": 'A line\nand "another", with ; and\ttab'},
    {"prompt": "Ünï 漢字 😀\u2028", "completion": "ok"},
]
LINES = [json.dumps(row, ensure_ascii=False).encode() for row in ROWS]


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def read(path: Path) -> list[SourceRow]:
    return list(open_source(str(path)))


def values(path: Path) -> list[object]:
    return [row.value for row in read(path)]


def numbers(path: Path) -> list[int]:
    return [row.place.number for row in read(path)]


def problem(row: SourceRow) -> str:
    assert row.error is not None
    return row.error.what


@pytest.mark.parametrize(
    "content",
    [
        b"\n".join(LINES),
        b"\n".join(LINES) + b"\n",
        b"\r\n".join(LINES) + b"\r\n",
        b"\xef\xbb\xbf" + b"\n".join(LINES),
        b"\n \n" + b"\n\n\t\n".join(LINES) + b"\n\n",
    ],
    ids=["plain", "last line ended", "CRLF", "BOM", "blank lines"],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "A.JSONL", "a.jsonl.gz"])
def test_json_lines_are_read_with_any_line_ends(tmp_path: Path, name: str, content: bytes) -> None:
    assert values(write(tmp_path / name, gzip.compress(content) if name.endswith("gz") else content)) == ROWS


def test_gzip_is_recognized_under_a_plain_name(tmp_path: Path) -> None:
    assert values(write(tmp_path / "a.jsonl", gzip.compress(b"\n".join(LINES)))) == ROWS


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("document", [ROWS, {"version": 1, "data": ROWS}], ids=["array", "object"])
def test_json_documents_are_read(tmp_path: Path, document: object, mark: bytes, indent: int | None) -> None:
    content = mark + json.dumps(document, indent=indent).encode()
    assert values(write(tmp_path / "a.json", content)) == ROWS
    assert str(read(tmp_path / "a.json")[1].place) == f"{tmp_path / 'a.json'}, row 2"


def test_json_lines_are_read_under_the_name_json(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", b"\n".join(LINES))
    assert values(path) == ROWS
    assert str(read(path)[1].place) == f"{path}, line 2"


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_tables_are_read(tmp_path: Path, mark: bytes, delimiter: str) -> None:
    quoted = [["prompt", "completion"]] + [
        [f'"{cell.replace(chr(34), chr(34) * 2)}"' for cell in row.values()] for row in ROWS
    ]
    content = "\r\n".join(delimiter.join(row) for row in quoted).encode()
    path = write(tmp_path / "a.csv", mark + content)
    assert values(path) == ROWS
    assert numbers(path) == [2, 4]  # the first row spans two lines


def test_parquet_is_read_in_batches(tmp_path: Path) -> None:
    many = [{"messages": [{"role": "user", "content": str(number)}]} for number in range(600)]
    pq.write_table(pa.Table.from_pylist(many), tmp_path / "a.parquet", row_group_size=400)
    assert values(tmp_path / "a.parquet") == many
    assert str(read(tmp_path / "a.parquet")[-1].place).endswith("a.parquet, row 600")


def test_broken_line_has_an_error_and_later_rows_follow(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b"\n".join([LINES[0], b"", b'{"prompt": "x" "y"}', LINES[1]]))
    rows = read(path)
    assert [row.value for row in rows] == [ROWS[0], None, ROWS[1]]
    assert [row.place.number for row in rows] == [1, 3, 4]
    assert problem(rows[1]) == "not JSON at column 16 (Expecting ',' delimiter)"


@pytest.mark.parametrize("line", [b"[" * 100_000, b"1" * 5000], ids=["endless nesting", "endless number"])
def test_json_that_breaks_the_parser_is_one_bad_row(tmp_path: Path, line: bytes) -> None:
    rows = read(write(tmp_path / "a.jsonl", line + b"\n" + LINES[0]))
    assert problem(rows[0]).startswith("JSON that cannot be read (")
    assert rows[1].value == ROWS[0]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_other_encoding_is_named_by_its_line(tmp_path: Path, name: str) -> None:
    lines = {
        "a.jsonl": ['{"text": "ok"}', '{"text": "café"}', '{"text": "ok"}'],
        "a.csv": ["text,n", "café,1", "ok,2"],
    }[name]
    path = write(tmp_path / name, "\n".join(lines).encode("cp1252"))
    bad = next(row for row in read(path) if row.error)
    assert bad.place.number == 2
    assert "not UTF-8" in problem(bad)
    assert "iconv" in str(bad.error)
    assert read(path)[-1].value is not None


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_utf_16_is_recognized(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, "\n".join(line.decode() for line in LINES).encode("utf-16"))
    with pytest.raises(DataError, match="it is UTF-16") as refusal:
        read(path)
    assert "iconv -f UTF-16" in str(refusal.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_rows_of_two_megabytes_can_be_read(tmp_path: Path, name: str) -> None:
    long = "word " * 400_000
    content = {
        "a.jsonl": json.dumps({"text": long}) + "\n" + json.dumps({"text": "x"}),
        "a.json": json.dumps([{"text": long}, {"text": "x"}]),
        "a.csv": f"text\n{long}\nx\n",
    }[name]
    assert values(write(tmp_path / name, content.encode())) == [{"text": long}, {"text": "x"}]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_memory_stays_flat(tmp_path: Path, name: str) -> None:
    text, count = "x" * 1000, 20_000  # 20 MB
    path = tmp_path / name
    if name == "a.parquet":
        pq.write_table(pa.table({"text": [text] * count}), path)
    else:
        head, line = ("text\n", text) if name == "a.csv" else ("", json.dumps({"text": text}))
        path.write_text(head + f"{line}\n" * count)
    tracemalloc.start()
    try:
        assert sum(1 for _ in open_source(str(path))) == count
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


def test_table_rows_of_another_width_are_bad(tmp_path: Path) -> None:
    rows = read(write(tmp_path / "a.csv", b"prompt,completion\na,b,c\n\nd,e\n"))
    assert problem(rows[0]) == "it has 3 fields, the header 2 (prompt, completion)"
    assert (rows[1].value, rows[1].place.number) == ({"prompt": "d", "completion": "e"}, 4)


def test_open_quote_is_a_bad_row(tmp_path: Path) -> None:
    rows = read(write(tmp_path / "a.csv", b'prompt,completion\na,b\n"c"x,d\ne,f\n"g,h\n'))
    assert [row.place.number for row in rows] == [2, 3, 4, 5]
    assert [row.error is not None for row in rows] == [False, True, False, True]
    assert problem(rows[1]).startswith("not CSV (")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"a": 1},\n {"a": }]', r"a\.json: not JSON at line 2, column 8"),
        (b'{"a": [], "b": []}', r"it holds 2 lists \(a, b\)"),
        (b"3", "it holds a number and no rows"),
        (b'"text"', "it holds text and no rows"),
        (b"{}", "it has no rows"),
        (b'{"prompt": {"0": "a", "1": "b"}}', r'it holds columns instead of rows(.|\n)*orient="records"'),
        ('["é"]'.encode("latin-1"), "byte 3 is not UTF-8"),
        (b"[" * 100_000, "JSON that cannot be read"),
    ],
)
def test_json_document_that_cannot_be_used_says_why(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(write(tmp_path / "a.json", content))


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.parquet", b"not parquet"), ("a.parquet", b""), ("a.jsonl.gz", gzip.compress(b"\n".join(LINES))[:-12])],
    ids=["not Parquet", "empty", "cut"],  # the time of compression is in the content
)
def test_damaged_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    with pytest.raises(DataError, match=rf"Cannot read .*{name}: "):
        read(write(tmp_path / name, content))


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.jsonl.gz"])
@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_file_without_rows_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    with pytest.raises(DataError, match="it has no rows"):
        read(write(tmp_path / name, content))


@pytest.mark.parametrize(("name", "content"), [("a.json", b"[]"), ("a.csv", b"prompt,completion\n")])
def test_container_without_rows_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    with pytest.raises(DataError, match="it has no rows"):
        read(write(tmp_path / name, content))


TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
PAIR_ROW = {"prompt": "a", "completion": "b"}
SHAPES: dict[str, tuple[object, list[object]]] = {
    "one conversation": (TALK, [{"messages": TALK}]),
    "list of conversations": ([TALK, TALK], [{"messages": TALK}] * 2),
    "one row with messages": ({"messages": TALK}, [{"messages": TALK}]),
    "one row with messages in another column": ({"id": 1, "talk": TALK}, [{"id": 1, "talk": TALK}]),
    "one row": (PAIR_ROW, [PAIR_ROW]),
    "one row of other columns": ({"a": 1}, [{"a": 1}]),
    "object of rows": ({"0": PAIR_ROW, "x": PAIR_ROW}, [PAIR_ROW] * 2),
}


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_json_of_every_shape_is_read(tmp_path: Path, shape: str, indent: int | None) -> None:
    document, rows = SHAPES[shape]
    assert values(write(tmp_path / "a.json", json.dumps(document, indent=indent).encode())) == rows


def test_objects_over_several_lines_follow_each_other(tmp_path: Path) -> None:
    content = "\n".join(json.dumps(row, indent=2) for row in ROWS) + "\n\n"
    path = write(tmp_path / "a.json", content.encode())
    assert values(path) == ROWS
    assert numbers(path) == [1, 2]
    with pytest.raises(DataError, match="not JSON at line 5, column 1"):
        read(write(path, (content[: content.index("}") + 2] + "{ x").encode()))


def test_line_that_is_a_conversation_is_a_row(tmp_path: Path) -> None:
    assert values(write(tmp_path / "a.jsonl", json.dumps(TALK).encode())) == [{"messages": TALK}]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_key_twice_is_named_unless_its_values_are_equal(tmp_path: Path, name: str) -> None:
    twice = b'{"prompt": "a", "prompt": "b", "completion": "c"}'
    path = write(tmp_path / name, twice + b"\n" + twice.replace(b'"b"', b'"a"'))
    if name == "a.jsonl":
        first, second = read(path)
        assert problem(first) == 'JSON that cannot be read (the key "prompt" twice, with different values)'
        assert second.value == {"prompt": "a", "completion": "c"}
    else:
        with pytest.raises(DataError, match='the key "prompt" twice, with different values'):
            read(path)


@pytest.mark.parametrize("levels", [64, 65, 500, 100_000])
def test_deep_nesting_is_refused_where_it_is_read(tmp_path: Path, levels: int) -> None:
    nested = "[" * (levels - 1) + "]" * (levels - 1)
    (row,) = read(write(tmp_path / "a.jsonl", f'{{"tools": {nested}}}'.encode()))
    assert (row.error is None) == (levels <= 64)
    if row.error:
        assert problem(row) == "JSON that cannot be read (more than 64 levels of nesting)"


@pytest.mark.parametrize("separator", [";", "|", ","])
def test_line_of_excel_names_the_separator(tmp_path: Path, separator: str) -> None:
    lines = [
        f"sep={separator}",
        f"prompt{separator}completion",
        f"foo{separator}bar; baz" if separator != ";" else "foo;b",
    ]
    path = write(tmp_path / "a.csv", "\r\n".join(lines).encode())
    assert values(path) == [{"prompt": "foo", "completion": "b" if separator == ";" else "bar; baz"}]
    assert numbers(path) == [3]


def test_spaces_after_separators_are_no_part_of_cells(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", b'prompt, completion , id\nfoo, "bar, baz", 1\n')
    assert values(path) == [{"prompt": "foo", "completion": "bar, baz", "id": "1"}]
    assert values(write(path, b"prompt,completion\nfoo, bar\n")) == [{"prompt": "foo", "completion": " bar"}]
    path = write(path, b"\n\nprompt;completion\nfoo;b,a,r\n")
    assert values(path) == [{"prompt": "foo", "completion": "b,a,r"}]
    assert numbers(path) == [4]


def test_column_twice_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", b"prompt,completion,prompt\na,b,c\n")
    with pytest.raises(DataError, match=r'a\.csv: it has the column "prompt" twice'):
        read(path)
    assert values(write(path, b",prompt,\n1,a,2\n")) == [{"": "2", "prompt": "a"}]
    table = pa.table([["a"], ["b"]], names=["prompt", "prompt"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r'a\.parquet: it has the column "prompt" twice'):
        read(tmp_path / "a.parquet")

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from hymba_tune.data import Conversation, Message, Text, build_dataset, open_source
from hymba_tune.data.formats import Names, parse
from hymba_tune.errors import ConfigError, DataError
from tests.data.small_tokenizers import turns

Pairs = list[tuple[str, str]]
PAIRS = [
    ("What is 6 times 7?", "It is 42.\n#### 42"),
    ('Say "hi", please;\nin two lines', "hi,\n\nhi"),
    ("Ünï 漢字 😀", " spaces around "),
    ("007", "7"),
]


def lines(rows: list[Any]) -> bytes:
    return "\n".join(json.dumps(row) for row in rows).encode()


def messages(pairs: Pairs) -> list[dict[str, Any]]:
    return [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in pairs]


def columns(pairs: Pairs, *names: str) -> list[dict[str, str]]:
    return [dict(zip(names, pair, strict=True)) for pair in pairs]


def sharegpt(pairs: Pairs) -> list[dict[str, Any]]:
    return [{"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]} for q, a in pairs]


def write_csv(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path)


WRITERS: dict[str, tuple[str, Callable[[Path, Pairs], object]]] = {
    "messages": ("a.jsonl", lambda path, pairs: path.write_bytes(lines(messages(pairs)))),
    "messages, gzip": ("a.jsonl.gz", lambda path, pairs: path.write_bytes(gzip.compress(lines(messages(pairs))))),
    "messages, JSON": ("a.json", lambda path, pairs: path.write_text(json.dumps(messages(pairs)))),
    "messages, JSON object": ("a.json", lambda path, pairs: path.write_text(json.dumps({"rows": messages(pairs)}))),
    "messages, Parquet": ("a.parquet", lambda path, pairs: write_parquet(path, messages(pairs))),
    "messages, CSV": (
        "a.csv",
        lambda path, pairs: write_csv(path, [{"messages": json.dumps(row["messages"])} for row in messages(pairs)]),
    ),
    "prompt and completion": (
        "a.jsonl",
        lambda path, pairs: path.write_bytes(lines(columns(pairs, "prompt", "completion"))),
    ),
    "prompt and completion, CSV": (
        "a.csv",
        lambda path, pairs: write_csv(path, columns(pairs, "prompt", "completion")),
    ),
    "prompt and completion, Parquet": (
        "a.parquet",
        lambda path, pairs: write_parquet(path, columns(pairs, "prompt", "completion")),
    ),
    "prompt and completion as messages": (
        "a.jsonl",
        lambda path, pairs: path.write_bytes(
            lines([{"prompt": row["messages"][:1], "completion": row["messages"][1:]} for row in messages(pairs)])
        ),
    ),
    "Alpaca": ("a.json", lambda path, pairs: path.write_text(json.dumps(columns(pairs, "instruction", "output")))),
    "Alpaca with empty input": (
        "a.csv",
        lambda path, pairs: write_csv(path, [{**row, "input": ""} for row in columns(pairs, "instruction", "output")]),
    ),
    "ShareGPT": ("a.jsonl", lambda path, pairs: path.write_bytes(lines(sharegpt(pairs)))),
    "ShareGPT, Parquet": ("a.parquet", lambda path, pairs: write_parquet(path, sharegpt(pairs))),
    "mapped": ("a.jsonl", lambda path, pairs: path.write_bytes(lines(columns(pairs, "question", "answer")))),
}


def fingerprint(form: str, folder: Path, pairs: Pairs, tokenizer: PreTrainedTokenizerFast) -> str:
    name, write = WRITERS[form]
    write(folder / name, pairs)
    mapping = {"prompt": "question", "completion": "answer"} if form == "mapped" else {}
    _, report = build_dataset([open_source(str(folder / name))], tokenizer, max_length=2048, mapping=mapping)
    assert report.conversations == len(pairs)
    return report.fingerprint


@pytest.mark.parametrize("form", list(WRITERS)[1:])
def test_same_data_in_every_format_gives_the_same_rows(
    form: str, tmp_path: Path, hymba: PreTrainedTokenizerFast
) -> None:
    assert fingerprint(form, tmp_path, PAIRS, hymba) == fingerprint("messages", tmp_path, PAIRS, hymba)


@pytest.mark.parametrize("form", list(WRITERS)[1:])
def test_gsm8k_in_every_format_gives_the_same_rows(
    form: str, tmp_path: Path, shared: Path, released: PreTrainedTokenizerFast
) -> None:
    raw = (shared / "data" / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:50]
    pairs = [(row["question"], row["answer"]) for row in map(json.loads, raw)]
    assert fingerprint(form, tmp_path, pairs, released) == fingerprint("messages", tmp_path, pairs, released)


def test_alpaca_input_follows_the_instruction() -> None:
    row = {"instruction": "Add.", "input": "1 and 2", "output": "3", "text": "Below is an instruction: Add. …"}
    assert parse(row) == Conversation(turns("Add.\n\n1 and 2", "3"))


def test_text_column_is_plain_text() -> None:
    assert parse({"text": "Once upon a time", "id": 7}) == Text("Once upon a time")


def test_fuller_format_wins() -> None:
    items = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert parse({"prompt": "Hi", "completion": "?", "messages": items}) == Conversation(turns("Hi", "Hello"))
    assert parse({"prompt": "Hi", "completion": "Hello", "messages": None}) == Conversation(turns("Hi", "Hello"))


def test_tools_contexts_and_system_are_read() -> None:
    row = {
        "conversations": [
            {"from": "human", "value": "Sum?"},
            {"from": "gpt", "value": "add(1, 2)"},
            {"from": "tool", "value": "3"},
            {"from": "gpt", "value": "3"},
        ],
        "system": "Be brief.",
        "tools": '[{"name": "add", "strict": null, "parameters": [{"a": 1, "b": null}]}]',
        "contexts": ["One.", "Two."],
    }
    expected = (*turns("Sum?", "add(1, 2)", system="Be brief."), Message("tool", "3"), Message("assistant", "3"))
    assert parse(row) == Conversation(
        expected, tools=({"name": "add", "parameters": [{"a": 1}]},), contexts=("One.", "Two.")
    )


def test_empty_text_in_a_list_of_tools_is_no_tool() -> None:
    items = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert parse({"messages": items, "tools": [""], "contexts": [""]}) == Conversation(turns("Hi", "Hello"))


def test_system_message_of_the_conversation_goes_before_the_column() -> None:
    items = [{"role": message.role, "content": message.content} for message in turns("Hi", "Hello", system="own")]
    assert parse({"messages": items, "system": "column"}) == Conversation(turns("Hi", "Hello", system="own"))


def test_last_message_may_be_from_the_user() -> None:
    items = [{"role": message.role, "content": message.content} for message in turns("Hi", "Hello", "Bye")]
    assert parse({"messages": items}) == Conversation(turns("Hi", "Hello", "Bye"))


def test_mapped_columns_decide_the_format() -> None:
    row = {"text": "…", "instruction": "Hi", "output": "wrong", "reply": "Hello"}
    names = Names.parse({"prompt": "instruction", "completion": "reply"})
    assert parse(row, names) == Conversation(turns("Hi", "Hello"))
    swapped = Names.parse({"prompt": "completion", "completion": "prompt"})
    assert parse({"prompt": "Hello", "completion": "Hi"}, swapped) == Conversation(turns("Hi", "Hello"))


def test_mapped_roles_are_renamed() -> None:
    items = [{"role": "customer", "content": "Hi"}, {"role": "bot", "content": "Hello"}]
    names = Names.parse({"role.bot": "assistant", "role.customer": "user"})
    assert parse({"messages": items}, names) == Conversation(turns("Hi", "Hello"))


def test_parts_of_a_content_are_one_text() -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo", "image": None}]
    assert parse(chat(USER, {**ANSWER, "content": parts})) == Conversation(turns("Hi", "Hello"))


def test_tool_calls_are_written_as_hymba_writes_them() -> None:
    hymba_call = '<toolcall> {"name": "add", "arguments": {"a": 1, "b": null}} </toolcall>'
    without_content = {**ANSWER, "content": None, "tool_calls": [CALL]}
    with_content = {**ANSWER, "tool_calls": [CALL, CALL]}
    assert parse(chat(USER, without_content)) == Conversation(turns("Hi", hymba_call))
    assert parse(chat(USER, with_content)) == Conversation(turns("Hi", f"Hello\n{hymba_call}\n{hymba_call}"))
    bare = {**ANSWER, "content": "", "tool_calls": [{"name": "now"}]}
    assert parse(chat(USER, bare)) == Conversation(
        turns("Hi", '<toolcall> {"name": "now", "arguments": {}} </toolcall>')
    )


def test_weights_of_answers_are_read() -> None:
    row = chat(
        {**USER, "weight": 0}, {**ANSWER, "weight": 0.0}, USER, {**ANSWER, "weight": 1}, {**ANSWER, "weight": 0.3}
    )
    first, last = (Message("assistant", "Hello", weight=weight) for weight in (0, 0.3))
    assert parse(row) == Conversation((Message("user", "Hi"), first, *turns("Hi", "Hello"), last))


def test_answers_in_a_prompt_have_no_loss() -> None:
    row = {"prompt": [USER, ANSWER, USER], "completion": "Hello"}
    first = Message("assistant", "Hello", weight=0.0)
    assert parse(row) == Conversation((Message("user", "Hi"), first, *turns("Hi", "Hello")))


def chat(*items: object) -> dict[str, object]:
    return {"messages": list(items)}


USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": null}'}}
BAD_ROWS = {
    "not an object": ("just text", r"the row is text\n *expected +an object such as"),
    "a list": ([USER], "the row is a list"),
    "no known column": (
        {"question": "Hi", "answer": "Hello"},
        r"match no format \(question, answer\)(.|\n)*--map prompt=question --map completion=answer",
    ),
    "a system prompt": (
        {"system_prompt": "Be brief.", "question": "Hi", "response": "Hello"},
        "--map system=system_prompt --map prompt=question --map completion=response",
    ),
    "other columns": ({"a": "x", "b": "y"}, "--map prompt=COLUMN --map completion=COLUMN"),
    "one other column": ({"body": "x"}, "--map text=body"),
    "messages by another name": ({"dialog": [USER, ANSWER]}, "--map messages=dialog"),
    "no column": ({}, r"match no format \(it has none\)"),
    "pairs": ({"prompt": "a", "chosen": "b", "rejected": "c"}, r"\n  to fix     hymba-tune dpo trains on pairs"),
    "half a format": ({"prompt": "Hi", "response": "Hello"}, r'it has no "completion"(.|\n)*--map completion=response'),
    "null": ({"prompt": "Hi", "completion": None}, r'it has no "completion" \(but prompt\)'),
    "Alpaca without instruction": ({"input": "Hi", "output": "Hello"}, "--map prompt=input --map completion=output"),
    "messages as text": ({"messages": "Hi"}, '"messages" is text\n *expected +a list of messages'),
    "completion as a number": (
        {"prompt": "Hi", "completion": 4},
        '"completion" is a number\n *expected +text, or a list',
    ),
    "output as a number": ({"instruction": "Hi", "output": 4.5}, '"output" is a number\n *expected +text'),
    "instruction as a boolean": ({"instruction": True, "output": "x"}, '"instruction" is true or false'),
    "content as a list of texts": (chat(USER, {**ANSWER, "content": ["Hello"]}), "part 1 of message 2 is text"),
    "content as an object": (chat(USER, {**ANSWER, "content": {"text": "Hello"}}), "message 2 is an object"),
    "an image": (
        chat({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, ANSWER),
        r'part 1 of message 1 is of type "image_url"\n *expected +parts such as',
    ),
    "message as text": (chat(USER, "Hello"), "message 2 is text\n *expected +an object such as"),
    "message without content": (chat(USER, {"role": "assistant"}), r'message 2 has no "content" \(but role\)'),
    "no tool calls": (
        chat(USER, {**ANSWER, "content": None, "tool_calls": []}),
        r'message 2 has no "content" \(it is null\)',
    ),
    "tool calls as text": (chat(USER, {**ANSWER, "tool_calls": "add"}), "the tool calls of message 2 are text"),
    "tool call of nothing": (chat(USER, {**ANSWER, "tool_calls": [{"id": 1}]}), "a tool call of message 2 names no"),
    "tool call of a user": (chat({**USER, "tool_calls": [CALL]}, ANSWER), "message 1 has tool calls, but is from the"),
    "tool call with half an argument": (
        chat(USER, {**ANSWER, "tool_calls": [{"name": "add", "arguments": "{"}]}),
        "the arguments of a tool call of message 2 are not JSON",
    ),
    "weight above 1": (
        chat(USER, {**ANSWER, "weight": 1.5}),
        r"message 2 has weight 1\.5\n *expected +a number from 0 \(no loss on the answer\) to 1(.|\n)*the largest one",
    ),
    "weight below 0": (chat(USER, {**ANSWER, "weight": -0.5}), r"message 2 has weight -0\.5"),
    "weight that is no number": (chat(USER, {**ANSWER, "weight": float("nan")}), "message 2 has weight nan"),
    "weight that is text": (
        chat(USER, {**ANSWER, "weight": "1"}),
        r"message 2 has weight 1\n *expected +a number",
    ),
    "weight of a question": (chat({**USER, "weight": 1}, ANSWER), "message 1 has weight 1, but is from the user"),
    "no answer with weight": (chat(USER, {**ANSWER, "weight": 0}), "all its answers have weight 0"),
    "answer in the prompt only": ({"prompt": [USER, ANSWER], "completion": [USER]}, "all its answers have weight 0"),
    "role as a number": (chat({"role": 1, "content": "Hi"}, ANSWER), "the role of message 1 is a number"),
    "unknown role": (
        chat(USER, {"role": "bot", "content": "Hello"}),
        r'message 2 has role "bot"\n *expected +one of: system, user, assistant, tool\n.*--map role\.bot=assistant',
    ),
    "empty answer": (chat(USER, {"role": "assistant", "content": " \n"}), "message 2 is an empty answer"),
    "empty completion": ({"prompt": "Hi", "completion": ""}, '"completion" is an empty answer'),
    "empty text": ({"text": "\t"}, '"text" is empty'),
    "no answer": (chat(USER), r"it has no message from the assistant(.|\n)*hymba-tune distill --loss seq"),
    "no messages": (chat(), "it has no message from the assistant"),
    "only an answer": (chat(ANSWER), "it has an answer but no question"),
    "late system": (
        chat(USER, {"role": "system", "content": "Be brief."}, ANSWER),
        "message 2 is a system message after",
    ),
    "bad prompt message": (
        {"prompt": [USER, {"role": "x", "content": ""}], "completion": "y"},
        'message 2 of "prompt" has',
    ),
    "half a character": (
        chat(USER, {"role": "assistant", "content": "a\ud83d"}),
        r"message 2 has half a character \(\\ud83d\)",
    ),
    "tools as text": ({**chat(USER, ANSWER), "tools": "add"}, '"tools" is text\n *expected +a list of objects'),
    "contexts of numbers": (
        {**chat(USER, ANSWER), "contexts": [1]},
        '"contexts" is a list\n *expected +a list of texts',
    ),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_row_says_what_is_wrong_and_what_to_do(case: str) -> None:
    row, message = BAD_ROWS[case]
    with pytest.raises(DataError, match=message):
        parse(row)


def test_error_names_the_users_own_columns() -> None:
    names = Names.parse({"prompt": "question", "completion": "answer"})
    with pytest.raises(DataError, match='"answer" is an empty answer'):
        parse({"question": "Hi", "answer": ""}, names)
    with pytest.raises(DataError, match=r'it has no "answer" \(but question\)'):
        parse({"question": "Hi", "answer": None}, names)


def test_missing_mapped_column_suggests_the_nearest() -> None:
    with pytest.raises(
        DataError, match=r"--map prompt=qestion: it has no column \"qestion\"(.|\n)*--map prompt=question"
    ):
        parse({"question": "Hi", "answer": "Hello"}, Names.parse({"prompt": "qestion"}))


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"promt": "question"}, r'--map promt=question: "promt" is not known(.|\n)*did you mean prompt\?'),
        (
            {"role.bot": "asistant"},
            r'--map role\.bot=asistant: "asistant" is not known(.|\n)*did you mean assistant\?',
        ),
        ({"zzz": "question"}, "one of: messages, system, tools"),
    ],
)
def test_mapping_of_an_unknown_name_is_refused(mapping: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Names.parse(mapping)

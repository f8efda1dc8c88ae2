"""Keys of messages and columns that change the meaning of a row are read or refused, never dropped."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hymba_tune.data import Conversation, Message
from hymba_tune.data.formats import Names, parse
from hymba_tune.data.messages import MEDIA, OTHER_ROLES, REASONING_KEYS, ROLES, with_context_first
from hymba_tune.data.prompts import parse_prompt
from hymba_tune.errors import DataError
from tests.data.small_tokenizers import turns

USER: dict[str, Any] = {"role": "user", "content": "q"}
ANSWER: dict[str, Any] = {"role": "assistant", "content": "a"}
CALL = '<toolcall> {"name": "f", "arguments": {"a": 1}} </toolcall>'
EMPTY_CALL = '<toolcall> {"name": "f", "arguments": {}} </toolcall>'
LEGACY = {"name": "f", "arguments": '{"a": 1}'}


def chat(*items: object, **columns: object) -> dict[str, Any]:
    return {"messages": list(items), **columns}


def contents(row: object, mapping: dict[str, str] | None = None) -> list[str]:
    """The contents of a parsed conversation."""
    example = parse(row, Names.parse(mapping or {}))
    assert isinstance(example, Conversation)
    return [message.content for message in example.messages]


def weights(row: object) -> list[float]:
    """The loss weights of the answers of a parsed conversation."""
    example = parse(row)
    assert isinstance(example, Conversation)
    return [message.weight for message in example.messages if message.role == "assistant"]


@pytest.mark.parametrize("content", [None, "", "Let me look."])
def test_function_call_is_one_tool_call(content: str | None) -> None:
    legacy = chat(USER, {"role": "assistant", "content": content, "function_call": LEGACY})
    modern = chat(USER, {"role": "assistant", "content": content, "tool_calls": [{"function": LEGACY}]})
    assert parse(legacy) == parse(modern)
    assert contents(legacy)[1].endswith(CALL)
    both = chat(USER, {**legacy["messages"][1], **modern["messages"][1]})
    assert parse(both) == parse(modern)
    other = {**both["messages"][1], "function_call": {"name": "g"}}
    with pytest.raises(DataError, match='message 2 has other calls in "function_call" than in "tool_calls"'):
        parse(chat(USER, other))
    with pytest.raises(DataError, match="a tool call of message 2 names no function"):
        parse(chat(USER, {**ANSWER, "function_call": "auto"}))


def test_sharegpt_function_call_is_a_tool_call() -> None:
    call = {"name": "f", "arguments": {"a": 1}}
    for value in (call, [call]):
        items = [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": json.dumps(value)},
            {"from": "observation", "value": "3"},
            {"from": "gpt", "value": "done"},
        ]
        expected = (*turns("q", CALL), Message("tool", "3"), Message("assistant", "done"))
        assert parse({"conversations": items}) == Conversation(expected)
    for value in ("look it up", "{}"):
        with pytest.raises(DataError, match="a tool call of message 2 names no function"):
            parse({"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": value}]})
    with pytest.raises(DataError, match="message 2 holds no tool call"):
        parse({"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "[]"}]})


@pytest.mark.parametrize("arguments", ["", " ", "null", "None", None, {}, "{}"])
def test_empty_arguments_of_a_tool_call_are_an_empty_object(arguments: object) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    assert contents(chat(USER, {"role": "assistant", "content": None, "tool_calls": [call]})) == ["q", EMPTY_CALL]


@pytest.mark.parametrize("arguments", [[1], "[1]", 3, "3", '"x"', "true"])
def test_arguments_that_are_no_object_are_refused(arguments: object) -> None:
    call = {"name": "f", "arguments": arguments}
    with pytest.raises(DataError, match=r"the arguments of a tool call of message 2 are (a|text|true)"):
        parse(chat(USER, {**ANSWER, "tool_calls": [call]}))


@pytest.mark.parametrize("key", sorted(REASONING_KEYS))
def test_reasoning_is_text_before_the_answer(key: str) -> None:
    assert contents(chat(USER, {**ANSWER, key: "think\n"})) == ["q", "<think>\nthink\n</think>\n\na"]
    assert contents(chat(USER, {**ANSWER, key: ""})) == ["q", "a"]
    repeated = "<think>think</think>a"
    assert contents(chat(USER, {**ANSWER, "content": repeated, key: "think"})) == ["q", repeated]
    with pytest.raises(DataError, match=f'message 1 has "{key}", but is from the user'):
        parse(chat({**USER, key: "x"}, ANSWER))
    with pytest.raises(DataError, match=f'message 2 has "{key}" and other reasoning in its content'):
        parse(chat(USER, {**ANSWER, "content": repeated, key: "other"}))
    with pytest.raises(DataError, match=f'"{key}" of message 2 is a number'):
        parse(chat(USER, {**ANSWER, key: 3}))


@pytest.mark.parametrize("key", ["train", "training"])
def test_axolotls_flag_is_a_weight(key: str) -> None:
    row = chat(USER, {**ANSWER, key: False}, {**USER, key: False}, {**ANSWER, key: True}, {**ANSWER, key: None})
    assert weights(row) == [0, 1, 1]
    assert weights(chat(USER, {**ANSWER, key: True, "weight": 0.5})) == [0.5]
    with pytest.raises(DataError, match="all its answers have weight 0"):
        parse(chat(USER, {**ANSWER, key: False}))
    with pytest.raises(DataError, match="message 2 has flags that contradict each other"):
        parse(chat(USER, {**ANSWER, key: False, "weight": 1}))
    with pytest.raises(DataError, match=f'"{key}" of message 2 is text'):
        parse(chat(USER, {**ANSWER, key: "yes"}))
    with pytest.raises(DataError, match="message 1 has train: true, but is from the user"):
        parse(chat({**USER, key: True}, ANSWER))
    with pytest.raises(DataError, match='message 2 has "train_detail", which cannot be used'):
        parse(chat(USER, {**ANSWER, "train_detail": [{"begin_offset": 0}]}))


@pytest.mark.parametrize("key", MEDIA)
def test_media_that_the_text_refers_to_are_refused(key: str) -> None:
    items = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "cat"}]
    for value in ("a.jpg", ["a.jpg"], {"path": "a.jpg"}):
        with pytest.raises(DataError, match=f'its text refers to "{key}", which the model cannot see'):
            parse({key: value, "conversations": items})
        with pytest.raises(DataError, match=f'message 1 has "{key}", which cannot be used'):
            parse(chat({**USER, key: value}, ANSWER))
    with pytest.raises(DataError, match="its text refers to"):
        parse({key: "a.jpg", "text": "<image> a cat"})
    assert contents({key: [], "conversations": items}) == ["<image>\nWhat?", "cat"]
    assert contents({key: "cover.jpg", "prompt": "q", "completion": "a"}) == ["q", "a"]


@given(role=st.sampled_from([*ROLES, *OTHER_ROLES]), spell=st.sampled_from([str.upper, str.title, " {} ".format]))
def test_roles_are_read_in_any_case(role: str, spell: Any) -> None:
    names = Names()
    content = '{"name": "f"}'
    row, spelled = (chat(USER, {"role": one, "content": content}, ANSWER) for one in (role, spell(role)))
    outcomes = []
    for one in (row, spelled):
        try:
            outcomes.append(parse(one, names))
        except DataError as error:
            outcomes.append(error.what)
    assert outcomes[0] == outcomes[1]
    assert isinstance(outcomes[0], Conversation) or "system message" in outcomes[0]


@pytest.mark.parametrize("role", ["Narrator", "a b", "x=y", "z" * 5000])
def test_no_role_is_proposed_where_unsure(role: str) -> None:
    with pytest.raises(DataError, match="message 2 has role") as refusal:
        parse(chat(USER, {"role": role, "content": "x"}))
    assert refusal.value.details["to fix"] == "rename the role, or --map role.NAME=ROLE"
    assert len(str(refusal.value)) < 300


def test_history_of_alpaca_is_earlier_turns() -> None:
    expected = Conversation(turns("q1", "a1", "q2", "a2", "q\n\ni", "a"))
    history = [["q1", "a1"], ["q2", "a2"]]
    for value in (history, json.dumps(history), repr(history)):
        assert parse({"instruction": "q", "input": "i", "output": "a", "history": value}) == expected
    row = {"prompt": "q\n\ni", "completion": "a", "history": history}
    assert parse(row) == expected
    for empty in ([], None, ""):
        assert parse({**row, "history": empty}) == Conversation(turns("q\n\ni", "a"))
    with pytest.raises(DataError, match=r'"history" is a list, but not one of pairs(.|\n)*such as \[\["question"'):
        parse({**row, "history": ["q1", "a1"]})
    with pytest.raises(DataError, match='"history" is text, but not one of pairs'):
        parse({**row, "history": "q1"})
    with pytest.raises(DataError, match='pair 2 of "history" is an empty answer'):
        parse({**row, "history": [["q1", "a1"], ["q2", ""]]})


def test_functions_are_tools() -> None:
    tools = [{"name": "f", "parameters": {}}]
    assert parse(chat(USER, ANSWER, functions=tools)) == parse(chat(USER, ANSWER, tools=tools))


@pytest.mark.parametrize("write", [json.dumps, repr])
def test_lists_written_as_text_are_read(write: Any) -> None:
    items = [USER, {**ANSWER, "content": 'it\'s "a"'}]
    expected = Conversation(turns("q", 'it\'s "a"'))
    assert parse({"messages": write(items)}) == expected
    assert parse({"prompt": write(items[:1]), "completion": write(items[1:])}) == expected
    assert parse({"prompt": items[0], "completion": items[1]}) == expected
    assert contents({"prompt": "[1, 2]", "completion": "{'a': 3}"}) == ["[1, 2]", "{'a': 3}"]
    assert contents({"prompt": "[" * 5000, "completion": "("}) == ["[" * 5000, "("]


class TestGreeting:
    """A conversation that begins with the assistant is the same everywhere: what comes before a question is context."""

    def test_has_no_loss(self) -> None:
        assert weights(chat(ANSWER, ANSWER, USER, ANSWER)) == [0, 0, 1]
        assert weights(chat({"role": "system", "content": "s"}, ANSWER, USER, ANSWER)) == [0, 1]
        assert weights(chat(ANSWER, USER, ANSWER, system="s")) == [0, 1]

    def test_is_the_same_in_a_prompt(self) -> None:
        prompt = parse_prompt({"messages": [ANSWER, USER]}, Names())
        assert [(message.role, message.weight) for message in prompt.messages] == [("assistant", 0), ("user", 1)]

    def test_alone_is_refused_unless_a_system_message_asks(self) -> None:
        for row in (chat(ANSWER), chat(ANSWER, ANSWER)):
            with pytest.raises(DataError, match="it has an answer but no question"):
                parse(row)
        with pytest.raises(DataError, match="it has no answer to train on after its first question"):
            parse(chat(ANSWER, USER))
        assert weights(chat({"role": "system", "content": "Write a poem."}, ANSWER)) == [1]

    def test_late_system_message_is_refused_in_prompts_too(self) -> None:
        items = [USER, ANSWER, {"role": "system", "content": "Be brief."}, USER]
        for read in (lambda: parse(chat(*items, ANSWER)), lambda: parse_prompt({"messages": items}, Names())):
            with pytest.raises(DataError, match="message 3 is a system message after others"):
                read()

    def test_nothing_stays_nothing(self) -> None:
        assert with_context_first([]) == []

"""Preferences in any format are the same conversations."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hymba_tune.data.formats import Conversation, Names
from hymba_tune.data.preferences import FIELDS, IdenticalPairError, PreferencePair, parse_pair, parse_unpaired
from hymba_tune.errors import ConfigError, DataError


def expected(*contents: str, system: str = "") -> list[tuple[str, str]]:
    """Roles and contents of a conversation of the user and the assistant in turn."""
    turns = [("system", system)] if system else []
    return turns + [(("user", "assistant")[index % 2], text) for index, text in enumerate(contents)]


def roles_and_contents(conversation: Conversation) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in conversation.messages]


def messages(*contents: str) -> list[dict[str, str]]:
    """The same as a data file holds it."""
    return [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(contents)]


ASSISTANT = [{"role": "assistant", "content": "Yes."}], [{"role": "assistant", "content": "No."}]
SAME: dict[str, dict[str, Any]] = {
    "texts": {"prompt": "Is it?", "chosen": "Yes.", "rejected": "No."},
    "messages": {"prompt": messages("Is it?"), "chosen": ASSISTANT[0], "rejected": ASSISTANT[1]},
    "text and messages": {"prompt": "Is it?", "chosen": ASSISTANT[0], "rejected": ASSISTANT[1]},
    "conversations": {"chosen": messages("Is it?", "Yes."), "rejected": messages("Is it?", "No.")},
    "ultrafeedback": {
        "prompt": "Is it?",
        "prompt_id": "17",
        "chosen": messages("Is it?", "Yes."),
        "rejected": messages("Is it?", "No."),
        "messages": messages("Is it?", "Yes."),
        "score_chosen": 8.0,
        "score_rejected": 3.5,
    },
    "hh": {"chosen": "\n\nHuman: Is it?\n\nAssistant: Yes.", "rejected": "\n\nHuman: Is it?\n\nAssistant: No."},
    "hh with prompt": {"prompt": "\n\nHuman: Is it?\n\nAssistant:", "chosen": " Yes.", "rejected": " No."},
    "one message each": {"prompt": "Is it?", "chosen": ASSISTANT[0][0], "rejected": ASSISTANT[1][0]},
    "LLaMA-Factory": {
        "conversations": [{"from": "human", "value": "Is it?"}],
        "chosen": {"from": "gpt", "value": "Yes."},
        "rejected": {"from": "gpt", "value": "No."},
    },
    "LMFlow": {
        "chosen": {"conversation_id": 1, "system": "", "tools": [""], "messages": messages("Is it?", "Yes.")},
        "rejected": {"conversation_id": 1, "system": "", "tools": [""], "messages": messages("Is it?", "No.")},
    },
    "LLaMA-Factory, Alpaca": {"instruction": "Is it?", "input": "", "chosen": "Yes.", "rejected": "No."},
    "prompt in messages": {"messages": messages("Is it?"), "chosen": "Yes.", "rejected": "No."},
    "lists as text": {
        "prompt": repr(messages("Is it?")),
        "chosen": json.dumps(ASSISTANT[0]),
        "rejected": json.dumps(ASSISTANT[1]),
    },
    "sharegpt": {
        "chosen": [{"from": "human", "value": "Is it?"}, {"from": "gpt", "value": "Yes."}],
        "rejected": [{"from": "human", "value": "Is it?"}, {"from": "gpt", "value": "No."}],
    },
}


@pytest.mark.parametrize("form", SAME)
def test_same_pair_in_every_format(form: str) -> None:
    pair = parse_pair(SAME[form])
    assert [(role, text.strip()) for role, text in roles_and_contents(pair.chosen)] == expected("Is it?", "Yes.")
    assert [(role, text.strip()) for role, text in roles_and_contents(pair.rejected)] == expected("Is it?", "No.")
    assert not pair.tie


def test_mapped_conversation_is_a_prompt() -> None:
    names = Names.parse({"prompt": "conversations"}, FIELDS)
    assert parse_pair(SAME["LLaMA-Factory"], names) == parse_pair(SAME["LLaMA-Factory"])


def test_input_and_history_are_part_of_the_prompt() -> None:
    row = {"instruction": "Is", "input": "it?", "history": [["a", "b"]], "chosen": "Yes.", "rejected": "No."}
    assert roles_and_contents(parse_pair(row).chosen) == expected("a", "b", "Is\n\nit?", "Yes.")


def test_greeting_of_a_whole_conversation_is_context() -> None:
    greeting = {"role": "assistant", "content": "Welcome!"}
    sides = {
        side: [greeting, *messages("Is it?", answer)] for side, answer in (("chosen", "Yes."), ("rejected", "No."))
    }
    for row in (sides, {**sides, "prompt": "Is it?"}):
        pair = parse_pair(row)
        assert [message.weight for message in pair.chosen.messages] == [0, 1, 1]


def test_turns_of_hh_become_messages() -> None:
    before = "\n\nHuman: One?\n\nAssistant: 1\n\nwith a blank line\n\nHuman: Two?\n\nAssistant:"
    pair = parse_pair({"chosen": f"{before} 2", "rejected": f"{before} 3"})
    assert roles_and_contents(pair.chosen) == expected("One?", "1\n\nwith a blank line", "Two?", "2")


def test_system_prompt_and_mapping_apply() -> None:
    names = Names.parse({"prompt": "question", "chosen": "better", "rejected": "worse"}, FIELDS)
    row = {"system": "Be brief.", "question": "Is it?", "better": "Yes.", "worse": "No."}
    assert roles_and_contents(parse_pair(row, names).rejected) == expected("Is it?", "No.", system="Be brief.")


def test_system_message_within_an_answer_belongs_to_its_conversation() -> None:
    sides = {
        side: {"system": "Be brief.", "messages": messages("Is it?", answer)}
        for side, answer in (("chosen", "Yes."), ("rejected", "No."))
    }
    assert roles_and_contents(parse_pair(sides).rejected) == expected("Is it?", "No.", system="Be brief.")
    with pytest.raises(DataError, match="its conversations differ from message 1 on"):
        parse_pair({**sides, "rejected": {**sides["rejected"], "system": "Be long."}})


def test_mapping_of_an_unknown_field_is_refused() -> None:
    with pytest.raises(ConfigError, match=r'--map chose=x: "chose" is not known(.|\n)*did you mean chosen\?'):
        Names.parse({"chose": "x"}, FIELDS)


@pytest.mark.parametrize("scores", [("score_chosen", "score_rejected"), ("chosen_rating", "rejected_rating")])
def test_equal_scores_are_a_tie(scores: tuple[str, str]) -> None:
    assert parse_pair(SAME["texts"] | dict.fromkeys(scores, 4.0)).tie
    assert not parse_pair(SAME["texts"] | dict.fromkeys(scores)).tie


def test_identical_answers_are_refused() -> None:
    with pytest.raises(IdenticalPairError, match='"chosen" and "rejected" are the same'):
        parse_pair({"prompt": "Is it?", "chosen": "Yes.", "rejected": "Yes."})


@pytest.mark.parametrize(
    ("row", "message"),
    {
        "text": ("no row", r"the row is text\n  expected   an object with chosen \+ rejected"),
        "no side": ({"prompt": "a", "chosen": "b"}, r'it has no "rejected" \(but prompt, chosen\)'),
        "single answer with a label": (
            {"prompt": "a", "completion": "b", "label": True},
            r'it has no "chosen" (.|\n)*to fix +hymba-tune kto',
        ),
        "answers": ({"messages": messages("a", "b")}, r'it has no "chosen" (.|\n)*to fix +hymba-tune sft'),
        "other names": ({"q": "a", "yes": "b", "rejected": "c"}, r'no "chosen" (.|\n)*to fix +--map chosen=COLUMN'),
        "no prompt": ({"chosen": "b", "rejected": "c"}, r'it has no "prompt" \(but chosen, rejected\)'),
        "empty answer in text turns": (
            {"chosen": "\n\nHuman: a?\n\nAssistant: ", "rejected": "\n\nHuman: a?\n\nAssistant: b"},
            r'^"chosen" is an empty answer',
        ),
        "empty list": ({"prompt": "a", "chosen": [], "rejected": "c"}, "it has no message from the assistant"),
        "prompt with an answer": (
            {"messages": messages("a", "b"), "chosen": "c", "rejected": "d"},
            r'"messages" ends with an answer, as if there were a third one',
        ),
        "image": (
            {"images": ["a.png"], "prompt": "<image> a", "chosen": "b", "rejected": "c"},
            r'its text refers to "images"',
        ),
        "judged": ({"prompt": "a", "completion": "b", "label": None}, r'it has no "chosen" (.|\n)*--map chosen=COLUMN'),
        "scored": ({"prompt": "a", "completion": "b", "score": 3}, r'it has no "chosen" (.|\n)*--map chosen=COLUMN'),
        "kto_tag": (
            {"messages": messages("a", "b"), "kto_tag": True},
            r"to fix +hymba-tune kto trains on single answers with labels, here with --map label=kto_tag",
        ),
        "empty": ({"prompt": "a", "chosen": " ", "rejected": "c"}, r'"chosen" is an empty answer'),
        "number": ({"prompt": "a", "chosen": 3, "rejected": "c"}, r'"chosen" is a number'),
        "role": (
            {"chosen": [{"role": "bot", "content": "a"}], "rejected": messages("a", "b")},
            r'message 1 has role "bot"',
        ),
        "prompts differ": (
            {"chosen": messages("a", "b", "c", "d"), "rejected": messages("a", "x", "c", "e")},
            r"its conversations differ from message 2 on, before their last answers",
        ),
        "lengths differ": (
            {"chosen": messages("a", "b", "c", "d"), "rejected": messages("a", "b")},
            r"its conversations differ from message 1 on, before",
        ),
        "ends with the user": (
            {"chosen": messages("a", "b", "c"), "rejected": messages("a", "b")},
            r'"chosen" does not end with an answer',
        ),
    }.values(),
)
def test_row_that_is_not_a_pair_is_refused(row: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_pair(row)


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [{"from": "human", "value": "Is it?"}, {"from": "gpt", "value": "Yes."}]},
        {"instruction": "Is it?", "output": "Yes."},
        {"prompt": messages("Is it?"), "completion": {"role": "assistant", "content": "Yes."}},
        {"prompt": "\n\nHuman: Is it?\n\nAssistant:", "completion": "Yes."},
    ],
)
def test_label_belongs_to_the_answer_in_every_format(row: dict[str, Any]) -> None:
    (preference,) = parse_unpaired({**row, "kto_tag": False}, Names.parse({"label": "kto_tag"}, FIELDS))
    assert roles_and_contents(preference.conversation) == expected("Is it?", "Yes.")
    assert not preference.good


@pytest.mark.parametrize("label", [True, 1, "true", "True ", "1"])
def test_label_is_read_in_every_notation(label: object) -> None:
    (preference,) = parse_unpaired({"prompt": "Is it?", "completion": "Yes.", "label": label})
    assert roles_and_contents(preference.conversation) == expected("Is it?", "Yes.")
    assert preference.good


def test_label_of_a_conversation_belongs_to_its_last_answer() -> None:
    (preference,) = parse_unpaired({"messages": messages("a", "b", "c", "d"), "label": 0})
    assert roles_and_contents(preference.conversation) == expected("a", "b", "c", "d")
    assert not preference.good


def test_pair_gives_a_good_and_a_bad_answer() -> None:
    pair: PreferencePair = parse_pair(SAME["texts"])
    good, bad = parse_unpaired(SAME["texts"])
    assert (good.conversation, good.good) == (pair.chosen, True)
    assert (bad.conversation, bad.good) == (pair.rejected, False)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "completion": "b"}, r'it has no "label" \(but prompt, completion\)(.|\n)*hymba-tune sft'),
        ({"prompt": "a", "completion": "b", "label": None}, r'^"label" is null\n(.|\n)*remove the row'),
        ({"messages": messages("a", "b"), "kto_tag": "true"}, r'it has no "label" (.|\n)*to fix +--map label=kto_tag'),
        ({"messages": messages("a", "b", "c"), "label": True}, '"messages" does not end with an answer'),
        ({"text": "a", "label": True}, 'it has no "completion"'),
        ({"prompt": "a", "answer": "b"}, r'it has no "label" (.|\n)*to fix +--map label=COLUMN'),
        ({"prompt": "a", "label": True}, r'it has no "completion" \(but prompt, label\)'),
        ({"prompt": "a", "completion": "b", "label": "maybe"}, r""""label" is 'maybe'\n  expected   true or false"""),
        ({"prompt": "a", "completion": "b", "label": [1]}, r'"label" is \[1\]'),
    ],
)
def test_row_without_a_label_is_refused(row: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_unpaired(row)

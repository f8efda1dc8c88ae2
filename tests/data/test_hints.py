"""A hint never does harm when it is followed: whatever is learned then is an answer."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from hymba_tune.data import Conversation, open_source, parse_pair, parse_unpaired, summary
from hymba_tune.data.chat import render
from hymba_tune.data.check_facts import next_commands, problems
from hymba_tune.data.checking import check_sources
from hymba_tune.data.formats import (
    LIKELY_ANSWERS,
    LIKELY_CONTEXTS,
    LIKELY_LABELS,
    LIKELY_PROMPTS,
    LIKELY_TEXTS,
    Names,
    parse,
)
from hymba_tune.data.preferences import FIELDS
from hymba_tune.errors import ConfigError, DataError
from tests.data.inputs import source

U, A = {"role": "user", "content": "u"}, {"role": "assistant", "content": "GOOD"}
BAD = {"role": "assistant", "content": "BAD"}
HUMAN, GPT = {"from": "human", "value": "u"}, {"from": "gpt", "value": "GOOD"}
CALL = '<toolcall> {"name": "f", "arguments": {"a": 1}} </toolcall>'
CORPUS: dict[str, Any] = {
    "plain": {"prompt": "u", "completion": "GOOD"},
    "other names": {"question": "u", "response": "GOOD", "source": "x"},
    "Dolly": {"instruction": "u", "context": "c", "response": "GOOD", "category": "x"},
    "OpenOrca": {"id": "x", "system_prompt": "s", "question": "u", "response": "GOOD"},
    "a passage": {"question": "u", "passage": "p", "answer": "GOOD"},
    "SQuAD": {"question": "u", "context": "c", "answers": {"text": ["x"], "answer_start": [0]}},
    "choices": {"question": "u", "choices": ["x", "y"], "answer": 1},
    "MT-Bench": {"question_id": 1, "choices": [{"index": 0, "turns": ["x"]}]},
    "BFCL": {"id": "x", "question": [[U]], "function": [{"name": "f", "parameters": {}}]},
    "tools only": {"functions": [{"name": "f", "description": "x"}]},
    "file name": {"filename": "data-00000-of-00001.arrow"},
    "file names": [{"filename": "a"}, {"filename": "b"}],
    "a title": {"title": "x"},
    "sentiment": {"sentence": "x", "label": 1},
    "classified text": {"text": "GOOD", "label": 0},
    "an article": {"article": "GOOD", "id": 7},
    "user names": {"user": "bob", "output": "x"},
    "messages elsewhere": {"dialog": [U, A]},
    "ShareGPT elsewhere": {"dialog": [HUMAN, GPT]},
    "messages as text": {"dialog": json.dumps([U, A])},
    "messages as Python": {"dialog": repr([U, A])},
    "two dialogs": {"dialog": [U, A], "old_dialog": [U, BAD]},
    "a column with spaces": {"my dialog": [U, A]},
    "bot": {"messages": [U, {"role": "bot", "content": "GOOD"}]},
    "Bot": {"messages": [U, {"role": "My Bot", "content": "GOOD"}]},
    "narrator": {"messages": [U, {"role": "narrator", "content": "x"}, A]},
    "roles in capitals": {"messages": [{"role": "USER", "content": "u"}, {"role": "Assistant", "content": "GOOD"}]},
    "function_call": {
        "conversations": [
            HUMAN,
            {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "3"},
            GPT,
        ]
    },
    "a pair": {"prompt": "u", "chosen": "GOOD", "rejected": "BAD"},
    "a pair of other names": {"question": "u", "chosen": "GOOD", "rejected": "BAD"},
    "LLaMA-Factory's pair": {
        "conversations": [HUMAN],
        "chosen": GPT,
        "rejected": {"from": "gpt", "value": "BAD"},
    },
    "HH": {"chosen": "\n\nHuman: u\n\nAssistant: GOOD", "rejected": "\n\nHuman: u\n\nAssistant: BAD"},
    "HH, empty": {"chosen": "\n\nHuman: u\n\nAssistant: ", "rejected": "\n\nHuman: u\n\nAssistant: BAD"},
    "UltraFeedback": {"prompt": "u", "chosen": [U, A], "rejected": [U, BAD], "messages": [U, A]},
    "judged": {"prompt": "u", "completion": "BAD", "label": False},
    "judged good": {"prompt": "u", "completion": "GOOD", "label": True},
    "judged, other names": {"question": "u", "answer": "BAD", "label": 0},
    "kto_tag": {"messages": [U, BAD], "kto_tag": False},
    "kto_tag, Alpaca": {"instruction": "u", "input": "", "output": "BAD", "kto_tag": "false"},
    "no label": {"prompt": "u", "completion": "BAD", "label": None},
    "scored": {"prompt": "u", "completion": "BAD", "score": 0.1},
    "a label of classes": {"prompt": "u", "completion": "BAD", "label": "negative"},
    "OpenAI's pair": {
        "input": {"messages": [U]},
        "preferred_output": [A],
        "non_preferred_output": [BAD],
    },
    "an image": {"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\nu"}, GPT]},
    "a greeting": {"messages": [{"role": "assistant", "content": "Welcome"}, U, A]},
    "axolotl": {"messages": [U, {**BAD, "train": False}, U, {**A, "train": True}]},
    "history": {"instruction": "u", "output": "GOOD", "history": [["q", "GOOD"]]},
    "nothing": {},
    "a number": 3,
}
"""Rows of odd files. What is learned from them may be GOOD, or the tool call; BAD only as a worse answer."""

UNKNOWN = {"no label", "scored", "a label of classes"}
"""Rows of which a check cannot know that their answers are bad. No hint says that these are good."""


@dataclass
class Learned:
    """What training would learn from a row."""

    good: list[str]
    bad: list[str] = field(default_factory=list)


def sft(row: object, mapping: dict[str, str], tokenizer: PreTrainedTokenizerFast) -> Learned:
    rendered = render(parse(row, Names.parse(mapping)), tokenizer)
    return Learned([rendered.text[start:end].removesuffix(tokenizer.eos_token) for start, end in rendered.learned])


def last(conversation: Conversation) -> str:
    return conversation.messages[-1].content


def dpo(row: object, mapping: dict[str, str], _: PreTrainedTokenizerFast) -> Learned:
    pair = parse_pair(row, Names.parse(mapping, FIELDS))
    return Learned([last(pair.chosen)], [last(pair.rejected)])


def kto(row: object, mapping: dict[str, str], _: PreTrainedTokenizerFast) -> Learned:
    answers = parse_unpaired(row, Names.parse(mapping, FIELDS))
    sides = [[last(answer.conversation) for answer in answers if answer.good is good] for good in (True, False)]
    return Learned(*sides)


VERBS: dict[str, Callable[[object, dict[str, str], PreTrainedTokenizerFast], Learned]] = {
    "sft": sft,
    "dpo": dpo,
    "kto": kto,
}
MAP = re.compile(r"--map ('[^']*'|[^\s,]+)")
VERB = re.compile(r"hymba-tune (sft|dpo|kto)\b")


def flags_in(hint: str) -> dict[str, str]:
    """The names that a hint proposes."""
    return dict(shlex.split(pair)[0].split("=", 1) for pair in MAP.findall(hint))


def follow(
    row: object, verb: str, tokenizer: PreTrainedTokenizerFast, mapping: dict[str, str] | None = None
) -> Iterator[Learned]:
    """Yield what is learned after each hint that is followed; hints with a place to fill in name nothing."""
    mapping = mapping or {}
    followed = False
    for _ in range(6):
        try:
            learned = VERBS[verb](row, mapping, tokenizer)
        except DataError as error:
            hint = error.details["to fix"]
        except ConfigError as error:
            raise AssertionError(f"the hint does not work: {error}") from error
        else:
            if followed:
                yield learned
            return
        flags = flags_in(hint)
        named = VERB.search(hint)
        if not (flags or named) or {"COLUMN", "ROLE"} & {*flags.values()} or "NAME=ROLE" in hint:
            return
        assert named or not flags.items() <= mapping.items(), f"following {hint!r} changes nothing"
        followed, verb, mapping = True, named[1] if named else verb, {**mapping, **flags}
    raise AssertionError("the hints have no end")


def assert_answers(learned: Learned) -> None:
    assert {*learned.good} <= {"GOOD", CALL}
    assert {*learned.bad} <= {"BAD"}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", CORPUS)
def test_what_hints_lead_to_is_an_answer(name: str, verb: str, hymba: PreTrainedTokenizerFast) -> None:
    rows = CORPUS[name] if isinstance(CORPUS[name], list) else [CORPUS[name]]
    for row in rows:
        for learned in follow(row, verb, hymba):
            assert_answers(learned)


@pytest.mark.parametrize("name", sorted({*CORPUS} - UNKNOWN))
def test_what_the_commands_of_a_check_lead_to_is_an_answer(name: str, hymba: PreTrainedTokenizerFast) -> None:
    rows = CORPUS[name] if isinstance(CORPUS[name], list) else [CORPUS[name]]
    result = check_sources([source(rows)], hymba, max_length=512)
    commands = [line for label, line in next_commands(result, ["a"], "m", [], 512) if label != "look"]
    for hint in [*commands, *(problem.fix for problem in problems(result))]:
        flags, named = flags_in(hint), VERB.search(hint)
        if (flags or named) and "COLUMN" not in flags.values() and "ROLE" not in flags.values():
            verb = named[1] if named else "sft"
            try:
                assert_answers(VERBS[verb](rows[0], flags, hymba))
            except DataError:
                for learned in follow(rows[0], verb, hymba, flags):
                    assert_answers(learned)


COLUMNS = sorted({*LIKELY_PROMPTS, *LIKELY_ANSWERS, *LIKELY_CONTEXTS, *LIKELY_TEXTS, *LIKELY_LABELS, *FIELDS})
COLUMNS += ["id", "url", "filename", "user", "assistant", "choices", "function", "a b", "c=d", "score", "output_type"]
ANSWER_COLUMNS = {*LIKELY_ANSWERS, *LIKELY_TEXTS, "text", "completion", "output"}


@settings(max_examples=120, deadline=None)
@given(
    columns=st.lists(st.sampled_from(COLUMNS), min_size=1, max_size=5, unique=True),
    kinds=st.lists(st.sampled_from(["text", "empty", "number", "true", "list", "talk"]), min_size=5, max_size=5),
    verb=st.sampled_from(sorted(VERBS)),
)
def test_hints_for_any_columns_lead_to_answers(
    columns: list[str], kinds: list[str], verb: str, hymba: PreTrainedTokenizerFast
) -> None:
    values: dict[str, Callable[[str], object]] = {
        "text": lambda column: f"the {column}",
        "empty": lambda _: "",
        "number": lambda _: 7,
        "true": lambda _: True,
        "list": lambda column: [{"name": column}],
        "talk": lambda _: [U, A],
    }
    row = {column: values[kind](column) for column, kind in zip(columns, kinds, strict=False)}
    for learned in follow(row, verb, hymba):
        allowed = {"GOOD", *(f"the {column}" for column in ANSWER_COLUMNS), "the chosen", "the rejected"}
        assert {*learned.good, *learned.bad} <= allowed


def test_folder_of_a_saved_dataset_leads_to_no_file_name(hymba: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    datasets.Dataset.from_list([CORPUS["plain"]]).save_to_disk(tmp_path / "saved")
    for name in ("saved", "saved/state.json", "saved/dataset_info.json"):
        for row in open_source(str(tmp_path / name)):
            assert not [*follow(row.value, "sft", hymba)]


@pytest.mark.parametrize(("label", "named"), [("my dialog", "'messages=my dialog'"), ("it's", "'messages=it'\"'\"'s'")])
def test_hints_are_quoted_for_the_shell(label: str, named: str) -> None:
    with pytest.raises(DataError) as refusal:
        parse({label: [U, A]})
    assert refusal.value.details["to fix"] == f"--map {named}"


def test_summary_counts_the_rows_that_it_does_not_parse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(summary, "PARSED", 2)
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "Hi", "completion": "Hello."}\n' * 5)
    assert summary.summarize([str(path)], {}).rows == 5

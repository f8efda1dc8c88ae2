from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from hymba_tune.config import ChatConfig
from hymba_tune.data import Conversation, Message, RowError
from hymba_tune.data.formats import Names
from hymba_tune.data.prompts import parse_prompt
from hymba_tune.errors import ConfigError, DataError
from hymba_tune.files import locked
from hymba_tune.generate import LoadableModel, answer_file
from hymba_tune.generate.decoding import Decoder


@contextmanager
def working(_: str) -> Iterator[Any]:
    yield lambda _: None


@pytest.fixture
def files(small_model: Path, tmp_path: Path) -> Any:
    rows = [{"prompt": f"Question {i}?" + " Really?" * (i % 3)} for i in range(7)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(**changes: Any) -> ChatConfig:
        usual: dict[str, Any] = {"model": str(small_model), "dtype": "float32", "max_new_tokens": 5, "seed": 1}
        usual |= {"prompts": tmp_path / "prompts.jsonl", "to": tmp_path / "answers.jsonl", "batch_size": 3}
        return ChatConfig(**usual | changes)

    return make


def test_greeting_before_the_question_is_context(files: Any, tmp_path: Path) -> None:
    greeting = [{"role": "assistant", "content": "Welcome!"}, {"role": "user", "content": "Hi"}]
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"messages": greeting}) + "\n")
    assert answer_file(files(), working) == (1, 0)


def test_answers_are_in_the_order_of_the_rows_and_an_interrupted_run_resumes(
    files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert answer_file(files(to=tmp_path / "whole.jsonl"), working) == (7, 0)
    whole = (tmp_path / "whole.jsonl").read_text()
    assert [json.loads(line)["prompt"][:11] for line in whole.splitlines()] == [f"Question {i}?" for i in range(7)]
    step = Decoder.step
    steps: list[int] = []

    def interrupted(self: Decoder) -> None:
        steps.append(1)
        if len(steps) > 6:
            raise KeyboardInterrupt
        step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            answer_file(files(), working)
    (part,) = tmp_path.glob(".answers.jsonl.*.part")
    assert not (tmp_path / "answers.jsonl").exists()
    answered_before = len(part.read_text().splitlines())
    assert 0 < answered_before < 7
    part.write_text(part.read_text() + '{"half')
    assert answer_file(files(), working) == (7 - answered_before, answered_before)
    assert (tmp_path / "answers.jsonl").read_text() == whole
    assert not list(tmp_path.glob(".*.part"))


def test_a_file_in_use_by_another_process_is_rejected(files: Any, tmp_path: Path) -> None:
    with (
        locked(tmp_path / ".answers.jsonl.lock"),
        pytest.raises(ConfigError, match=r"--to .*answers\.jsonl is in use by another process"),
    ):
        answer_file(files(), working)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.jsonl"]


def test_other_settings_start_over(files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(_: Decoder) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Decoder, "step", stop)
    for changes in ({}, {"temperature": 0.0}):
        with pytest.raises(KeyboardInterrupt):
            answer_file(files(**changes), working)
    assert len(list(tmp_path.glob(".answers.jsonl.*.part"))) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"to": None}, "--from and --to go together"),
        ({"against": ["hymba-nano"]}, "answers a file with one model"),
        ({"to": Path("answers.csv")}, "answers are written as JSON Lines"),
        ({"to": Path("nowhere/answers.jsonl")}, "there is no folder nowhere"),
        ({"prompts": Path("nothing.jsonl")}, "Cannot find nothing.jsonl"),
    ],
)
def test_mistakes_are_reported_first(files: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        answer_file(files(**changes), working)


def test_a_bad_row_is_named_before_the_weights_load(
    files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LoadableModel, "load", Mock(side_effect=AssertionError("the weights are loaded")))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "One?"}\n{"answer": "Two"}\n')
    with pytest.raises(RowError, match="line 2: it has neither a prompt nor messages") as caught:
        answer_file(files(), working)
    assert "--on-bad-row" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "a"}, [("user", "a")]),
        ({"prompt": "a", "completion": "b", "system": "s"}, [("system", "s"), ("user", "a")]),
        ({"prompt": [{"role": "user", "content": "a"}]}, [("user", "a")]),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            [("user", "a")],
        ),
    ],
)
def test_prompt_of_a_row(row: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    assert parse_prompt(row, Names()) == Conversation(tuple(Message(*pair) for pair in expected))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (["a"], "the row is a list"),
        ({"prompt": " "}, "it has no message from the user with text"),
        ({"text": "a"}, "neither a prompt nor messages"),
    ],
)
def test_a_row_without_a_prompt_is_rejected(row: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_prompt(row, Names())

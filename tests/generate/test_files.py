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
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(**changes: Any) -> ChatConfig:
        usual: dict[str, Any] = {"model": str(small_model), "dtype": "float32", "max_new_tokens": 5, "seed": 1}
        usual |= {"prompts": tmp_path / "asked.jsonl", "to": tmp_path / "said.jsonl", "batch_size": 3}
        return ChatConfig(**usual | changes)

    return make


def test_answers_stand_in_the_order_of_the_rows_and_go_on_after_a_stop(
    files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert answer_file(files(to=tmp_path / "whole.jsonl"), working) == (7, 0)
    whole = (tmp_path / "whole.jsonl").read_text()
    assert [json.loads(line)["prompt"][:11] for line in whole.splitlines()] == [f"Question {i}?" for i in range(7)]
    step, steps = Decoder.step, []

    def interrupted(self: Decoder) -> None:
        steps.append(1)
        if len(steps) > 6:
            raise KeyboardInterrupt
        step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            answer_file(files(), working)
    (part,) = tmp_path.glob(".said.jsonl.*.part")
    assert not (tmp_path / "said.jsonl").exists()
    known = len(part.read_text().splitlines())
    assert 0 < known < 7
    part.write_text(part.read_text() + '{"half')
    assert answer_file(files(), working) == (7 - known, known)
    assert (tmp_path / "said.jsonl").read_text() == whole
    assert not list(tmp_path.glob(".*.part"))


def test_file_that_another_process_answers_is_left_to_it(files: Any, tmp_path: Path) -> None:
    with (
        locked(tmp_path / ".said.jsonl.lock"),
        pytest.raises(ConfigError, match=r"--to .*said\.jsonl is in use by another process"),
    ):
        answer_file(files(), working)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["asked.jsonl"]


def test_other_settings_begin_anew(files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(_: Decoder) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Decoder, "step", stop)
    for changes in ({}, {"temperature": 0.0}):
        with pytest.raises(KeyboardInterrupt):
            answer_file(files(**changes), working)
    assert len(list(tmp_path.glob(".said.jsonl.*.part"))) == 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"to": None}, "--from and --to go together"),
        ({"against": ["hymba-nano"]}, "answers a file with one model"),
        ({"to": Path("said.csv")}, "answers are written as JSON lines"),
        ({"to": Path("nowhere/said.jsonl")}, "there is no folder nowhere"),
        ({"prompts": Path("nothing.jsonl")}, "Cannot find nothing.jsonl"),
    ],
)
def test_mistakes_are_seen_first(files: Any, changes: dict[str, Any], said: str) -> None:
    with pytest.raises((ConfigError, DataError), match=said):
        answer_file(files(**changes), working)


def test_a_bad_row_is_named_before_the_weights_load(
    files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LoadableModel, "load", Mock(side_effect=AssertionError("the weights are loaded")))
    (tmp_path / "asked.jsonl").write_text('{"prompt": "One?"}\n{"answer": "Two"}\n')
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
def test_what_a_row_asks(row: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    assert parse_prompt(row, Names()) == Conversation(tuple(Message(*pair) for pair in expected))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (["a"], "the row is a list"),
        ({"prompt": " "}, "it asks nothing"),
        ({"text": "a"}, "neither a prompt nor messages"),
    ],
)
def test_what_asks_nothing_is_refused(row: object, said: str) -> None:
    with pytest.raises(DataError, match=said):
        parse_prompt(row, Names())

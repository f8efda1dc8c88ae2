from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hymba_tune.config import ChatConfig
from hymba_tune.data import encode_prompt
from hymba_tune.errors import ConfigError
from hymba_tune.generate import ChatSession

HEAR: list[str] = []


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What the models were shown, instead of their answers."""
    seen: list[list[str]] = []

    def record(_: Any, tokenizer: Any, conversation: Any, **__: Any) -> str:
        assert encode_prompt(conversation, tokenizer)
        seen.append([message.content for message in conversation.messages])
        if conversation.messages[-1].content == "stop":
            raise KeyboardInterrupt
        return f"answer {len(seen)}"

    monkeypatch.setattr("hymba_tune.generate.chat.answer", record)
    return seen


@pytest.fixture
def talk(small_model: Path, tmp_path: Path) -> ChatSession:
    (tmp_path / "other").symlink_to(small_model)
    return ChatSession(
        ChatConfig(model=str(small_model), against=[str(tmp_path / "other")], dtype="float32", system="Be brief.")
    )


def test_every_model_goes_on_from_its_own_answers(talk: ChatSession, asked: list[list[str]]) -> None:
    said: list[str] = []
    for text in ("one", "two"):
        talk.ask(text, HEAR.append, on_begin=said.append, on_end=lambda: said.append("end"))
    assert asked[2:] == [["Be brief.", "one", f"answer {i}", "two"] for i in (1, 2)]
    assert said == [talk.chats[0].name, "end", talk.chats[1].name, "end"] * 2


def test_undo_takes_a_turn_back(talk: ChatSession, asked: list[list[str]]) -> None:
    assert talk.command("/undo") == "nothing was said yet"
    talk.ask("one", HEAR.append)
    talk.ask("two", HEAR.append)
    assert talk.command("/undo") == "taken back"
    talk.ask("three", HEAR.append)
    assert asked[-1] == ["Be brief.", "one", "answer 2", "three"]


def test_reset_and_system(talk: ChatSession, asked: list[list[str]]) -> None:
    talk.ask("one", HEAR.append)
    assert talk.command("/system Be long.") == "system prompt: Be long."
    talk.ask("two", HEAR.append)
    assert asked[-1] == ["Be long.", "one", "answer 2", "two"]
    talk.command("/reset")
    assert talk.command("/system") == "system prompt: none"
    talk.ask("three", HEAR.append)
    assert asked[-1] == ["three"]


def test_an_interruption_takes_the_question_back_from_all(talk: ChatSession, asked: list[list[str]]) -> None:
    talk.ask("one", HEAR.append)
    with pytest.raises(KeyboardInterrupt):
        talk.ask("stop", HEAR.append)
    assert [len(chat.messages) for chat in talk.chats] == [3, 3]
    assert len(asked) == 3


def test_saved_conversations_can_be_trained_on(talk: ChatSession, asked: list[list[str]], tmp_path: Path) -> None:
    file = tmp_path / "kept.jsonl"
    assert talk.command(f"/save {file}") == "nothing was said yet"
    talk.ask("one", HEAR.append)
    talk.command(f"/save {file}")
    talk.command(f"/save {file}")
    rows = [json.loads(line)["messages"] for line in file.read_text().splitlines()]
    assert [row[-1]["content"] for row in rows] == ["answer 1", "answer 2"] * 2
    assert [message["role"] for message in rows[0]] == ["system", "user", "assistant"]
    assert len(asked) == 2


def test_history_and_help(talk: ChatSession, asked: list[list[str]]) -> None:
    talk.ask("one", HEAR.append)
    assert f"{talk.chats[0].name}:\nsystem: Be brief.\nuser: one\nassistant: answer 1" in talk.command("/history")
    assert all(name in talk.command("/help") for name in ("/undo", "/save", "/quit"))
    assert asked


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/sing", "There is no /sing here"),
        ("/save", "where to"),
        ("/save nowhere/x.jsonl", "No such file or directory"),
    ],
)
def test_slips_are_explained(talk: ChatSession, asked: list[list[str]], line: str, said: str) -> None:
    talk.ask("one", HEAR.append)
    with pytest.raises(ConfigError, match=said):
        talk.command(line)
    assert asked

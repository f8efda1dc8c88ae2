from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hymba_tune.config import ChatConfig
from hymba_tune.data import encode_prompt
from hymba_tune.errors import ConfigError
from hymba_tune.generate import ChatSession

PARTS: list[str] = []


@pytest.fixture
def conversations(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Records the conversations that the models get, and replaces their answers."""
    recorded: list[list[str]] = []

    def record(_: Any, tokenizer: Any, conversation: Any, **__: Any) -> str:
        assert encode_prompt(conversation, tokenizer)
        recorded.append([message.content for message in conversation.messages])
        if conversation.messages[-1].content == "stop":
            raise KeyboardInterrupt
        return f"answer {len(recorded)}"

    monkeypatch.setattr("hymba_tune.generate.chat.answer", record)
    return recorded


@pytest.fixture
def session(small_model: Path, tmp_path: Path) -> ChatSession:
    (tmp_path / "other").symlink_to(small_model)
    return ChatSession(
        ChatConfig(model=str(small_model), against=[str(tmp_path / "other")], dtype="float32", system="Be brief.")
    )


def test_every_model_continues_from_its_own_answers(session: ChatSession, conversations: list[list[str]]) -> None:
    calls: list[str] = []
    for text in ("one", "two"):
        session.reply(text, PARTS.append, on_begin=calls.append, on_end=lambda: calls.append("end"))
    assert conversations[2:] == [["Be brief.", "one", f"answer {i}", "two"] for i in (1, 2)]
    assert calls == [session.chats[0].name, "end", session.chats[1].name, "end"] * 2


def test_undo_removes_the_last_question_and_answer(session: ChatSession, conversations: list[list[str]]) -> None:
    assert session.command("/undo") == "the conversation is empty"
    session.reply("one", PARTS.append)
    session.reply("two", PARTS.append)
    assert session.command("/undo") == "removed the last question and answer"
    session.reply("three", PARTS.append)
    assert conversations[-1] == ["Be brief.", "one", "answer 2", "three"]


def test_reset_and_system(session: ChatSession, conversations: list[list[str]]) -> None:
    session.reply("one", PARTS.append)
    assert session.command("/system Be long.") == "system prompt: Be long."
    session.reply("two", PARTS.append)
    assert conversations[-1] == ["Be long.", "one", "answer 2", "two"]
    session.command("/reset")
    assert session.command("/system") == "system prompt: none"
    session.reply("three", PARTS.append)
    assert conversations[-1] == ["three"]


def test_an_interruption_removes_the_question_from_all_conversations(
    session: ChatSession, conversations: list[list[str]]
) -> None:
    session.reply("one", PARTS.append)
    with pytest.raises(KeyboardInterrupt):
        session.reply("stop", PARTS.append)
    assert [len(chat.messages) for chat in session.chats] == [3, 3]
    assert len(conversations) == 3


def test_saved_conversations_can_be_trained_on(
    session: ChatSession, conversations: list[list[str]], tmp_path: Path
) -> None:
    file = tmp_path / "saved.jsonl"
    assert session.command(f"/save {file}") == "the conversation is empty"
    session.reply("one", PARTS.append)
    session.command(f"/save {file}")
    session.command(f"/save {file}")
    rows = [json.loads(line)["messages"] for line in file.read_text().splitlines()]
    assert [row[-1]["content"] for row in rows] == ["answer 1", "answer 2"] * 2
    assert [message["role"] for message in rows[0]] == ["system", "user", "assistant"]
    assert len(conversations) == 2


def test_history_and_help(session: ChatSession, conversations: list[list[str]]) -> None:
    session.reply("one", PARTS.append)
    assert f"{session.chats[0].name}:\nsystem: Be brief.\nuser: one\nassistant: answer 1" in session.command("/history")
    assert all(name in session.command("/help") for name in ("/undo", "/save", "/quit"))
    assert conversations


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/sing", "Unknown command /sing"),
        ("/save", "not a file name in .jsonl"),
        ("/save nowhere/x.jsonl", "No such file or directory"),
    ],
)
def test_command_mistakes_are_explained(
    session: ChatSession, conversations: list[list[str]], line: str, message: str
) -> None:
    session.reply("one", PARTS.append)
    with pytest.raises(ConfigError, match=message):
        session.command(line)
    assert conversations

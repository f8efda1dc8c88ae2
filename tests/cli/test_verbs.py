"""From data to a merged model that answers, as a person does it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest

from hymba_tune.cli import chat as chats
from hymba_tune.cli.screen import SafeConsole
from hymba_tune.generate import Chat
from tests.cli.conftest import Command
from tests.cli.inputs import assert_plain
from tests.preferences import save_pairs
from tests.runs import ANSWER_TOKENS


@pytest.fixture(autouse=True)
def _short_samples(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("hymba_tune.train.samples.SAMPLE_TOKENS", ANSWER_TOKENS)
    monkeypatch.chdir(tmp_path)


def test_sft_chat_merge_chat(command: Command, small_model: Path, questions: Path, tmp_path: Path) -> None:
    (tmp_path / "small").symlink_to(small_model)
    (tmp_path / "data.jsonl").symlink_to(questions)
    flags = "--rank 4 --lr 0.01 --steps 4 --batch-size 4 --log-every 2 --eval-every 2 --dtype float32 --out runs/mine"
    trained = command("sft", "--model", "small", "--data", "data.jsonl", *flags.split())
    assert_plain(trained)
    assert " trained  LoRA r4 on all (7 kinds × 3 layers) + meta tokens" in trained.out
    table = [line.split() for line in trained.out.splitlines() if "/4 " in line]
    assert [line[0] for line in table] == ["0/4", "2/4", "2/4", "4/4", "4/4"]
    assert "step   loss     eval" in trained.out
    assert "▼" in trained.out
    assert "held-out loss" in trained.out
    assert "hymba-tune chat runs/mine" in trained.out
    assert "hymba-tune merge runs/mine --out mine-merged" in trained.out

    ask = [
        "--prompt",
        "I see two cats. What do I see?",
        "--temperature",
        0,
        "--max-new-tokens",
        8,
        "--dtype",
        "float32",
    ]
    answer = command("chat", "runs/mine", *ask)
    assert_plain(answer)
    assert answer.out.strip()

    merged = command("merge", "runs/mine", "--out", "mine-merged", "--dtype", "float32")
    assert_plain(merged)
    assert "hymba-tune chat mine-merged" in merged.out
    assert command("chat", "mine-merged", *ask) == answer
    assert command("chat", "small", *ask) != answer
    assert command("chat", "--model", "mine-merged", *ask) == answer

    again = command("merge", "runs/mine", "--out", "mine-merged")
    assert again.code == 2
    assert "--out mine-merged exists and is not empty." in again.err

    longer = command("sft", "--resume", "runs/mine", "--steps", 6)
    assert_plain(longer)
    assert "6/6" in longer.out


def test_sft_then_dpo_then_chat(command: Command, finished_run: Path, tmp_path: Path) -> None:
    (tmp_path / "sft").symlink_to(finished_run)
    save_pairs(tmp_path / "pairs.jsonl")
    flags = "--rank 4 --lr 0.01 --steps 2 --batch-size 4 --log-every 1 --eval-split 0.2 --dtype float32 --out runs/dpo"
    trained = command("dpo", "--model", "sft", "--data", "pairs.jsonl", *flags.split())
    assert_plain(trained)
    assert " start      sft: its adapter is merged in, a new one trained" in trained.out
    assert "computed with the new adapter off · sigmoid" in trained.out
    assert "step   loss     eval  margin   acc" in trained.out
    assert "held-out pairs ranked correctly" in trained.out
    assert_plain(command("chat", "runs/dpo", "--prompt", "Hello", "--max-new-tokens", 4, "--dtype", "float32"))
    assert_plain(command("dpo", "--resume", "runs/dpo", "--steps", 3))
    refused = command("sft", "--resume", "runs/dpo")
    assert refused.code == 2
    assert "hymba-tune dpo --resume runs/dpo" in refused.err


def test_recipe_runs(command: Command, small_model: Path, questions: Path, tmp_path: Path) -> None:
    recipe = f"model: {small_model}\ndata: [{questions}]\nsteps: 1\nrank: 2\neval_split: 0\ndtype: float32\n"
    (tmp_path / "mine.yaml").write_text(recipe)
    assert command("sft", "--config", "mine.yaml", "--rank", 3, "--out", "run").code == 0
    assert "rank: 3" in (tmp_path / "run/config.yaml").read_text()


def test_run_without_held_out_data_or_conversations_still_reports(
    command: Command, small_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "texts.jsonl").write_text('{"text": "Once upon a time there was a cat."}\n' * 4)
    flags = "--data texts.jsonl --steps 1 --eval-split 0 --dtype float32 --out run"
    result = command("sft", "--model", small_model, *flags.split())
    assert result.code == 0, result.err
    assert "4 texts" in result.out
    assert "none held out" in result.out
    assert "held-out loss" not in result.out
    assert "run directory        run" in result.out


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lines that a person types; then Ctrl-D."""
    lines: list[str] = []

    def read(prompt: str = "") -> str:
        del prompt
        if not lines:
            raise EOFError
        return lines.pop(0)

    monkeypatch.setattr("builtins.input", read)
    return lines


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts that the model receives."""
    prompts: list[str] = []

    def ask(_: Chat, text: str, on_text: Callable[[str], None]) -> str:
        prompts.append(text)
        for part in ("You said: ", text, f" [{len(prompts)}]"):
            on_text(part)
        return ""

    monkeypatch.setattr(Chat, "reply", ask)
    monkeypatch.setattr(Chat, "reset", lambda _: prompts.append("reset"))
    return prompts


def test_chat_continues_until_quit(command: Command, small_model: Path, typed: list[str], received: list[str]) -> None:
    Path("small").symlink_to(small_model)
    typed += ["hello", "", "  ", "[red]what?[/red]", "/reset", "/what", "again", "/quit", "never"]
    result = command("chat", "small", "--dtype", "float32")
    assert_plain(result)
    assert received == ["hello", "[red]what?[/red]", "reset", "again"]
    assert "You said: [red]what?[/red] [2]\n" in result.out
    assert result.out.startswith(" small · /help lists commands, /quit or Ctrl-D quits\n")
    assert " Unknown command /what." in result.out
    assert typed == ["never"]


def test_two_models_receive_the_same_prompts(
    command: Command, small_model: Path, typed: list[str], received: list[str], tmp_path: Path
) -> None:
    for name in ("one", "two"):
        (tmp_path / name).symlink_to(small_model)
    typed += ["hello"]
    result = command("chat", "one", "--against", "two", "--dtype", "float32")
    assert_plain(result)
    assert received == ["hello", "hello"]
    assert " one\nYou said: hello [1]\n two\nYou said: hello [2]\n" in result.out


def test_chat_answers_a_file(command: Command, small_model: Path, tmp_path: Path) -> None:
    (tmp_path / "questions.jsonl").write_text('{"question": "One?"}\n{"question": "Two?", "id": 7}\n')
    words = ["--from", "questions.jsonl", "--to", "answers.jsonl", "--map", "prompt=question", "--max-new-tokens", 4]
    result = command("chat", small_model, "--dtype", "float32", *words)
    assert_plain(result)
    assert result.out.endswith(" 2 answers → answers.jsonl\n")
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [row["question"] for row in rows] == ["One?", "Two?"]
    assert rows[1].keys() == {"question", "id", "model_answer"}
    again = command("chat", small_model, *words)
    assert again.code == 2
    assert "--to answers.jsonl exists." in again.err


def test_chat_ends_at_the_end_of_input(
    command: Command, small_model: Path, typed: list[str], received: list[str]
) -> None:
    typed += ["hello"]
    assert command("chat", small_model, "--dtype", "float32").code == 0
    assert received == ["hello"]


def test_prompt_of_the_input_line_tells_readline_what_takes_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chats._prompt() == "> "
    monkeypatch.setattr("sys.stdin", Mock(isatty=Mock(return_value=True)))
    monkeypatch.setattr(chats, "console", SafeConsole(force_terminal=True))
    prompt = chats._prompt()
    assert "\033" in prompt
    assert re.sub("\001.*?\002", "", prompt) == "> "


def test_chat_prints_an_answer_in_lines_as_it_was_written(
    command: Command, small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "one " * 60 + "[bold]\n    :smile: two"

    monkeypatch.setattr(Chat, "reply", lambda _, __, on_text: on_text(text))
    assert command("chat", small_model, "--prompt", "x").out == text + "\n"


def test_text_that_is_not_utf8_is_refused_and_does_not_end_a_session(
    command: Command, small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = command("chat", small_model, "--prompt", "a\udcff")
    assert (refused.code, "the user message has half a character (\\udcff)" in refused.err) == (2, True)
    lines = iter(["a\udcff", "hello"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines, "/quit"))
    session = command("chat", small_model, "--max-new-tokens", 1)
    assert session.code == 0
    assert "has half a character" in session.out

"""`hymba-tune data` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from hymba_tune.cli import data
from hymba_tune.data import cache_folder
from tests.cli.conftest import Command

NANO = ("--model", "hymba-nano")


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hymba_tune.cli.data.console", Console(width=60, highlight=False, emoji=False))


@pytest.fixture
def good() -> str:
    rows = [{"prompt": f"Count to {number}.", "completion": str(number)} for number in range(20)]
    Path("good.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "good.jsonl"


@pytest.fixture
def bad(good: str) -> str:
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "bot", "content": "\x1b[31mred"}]}
    Path("bad.jsonl").write_text(Path(good).read_text() * 2 + json.dumps(row) + "\n{\n")
    return "bad.jsonl"


def test_check_of_good_data_exits_with_zero(command: Command, good: str) -> None:
    result = command("data", "check", good, *NANO)
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith(" Can be trained on as it is.\n")
    assert "20 rows · prompt and completion" in result.out
    assert " train   hymba-tune sft --data good.jsonl --model hymba-nano --max-length 2048" in result.out


def test_check_of_bad_data_exits_with_two_and_lists_problems(command: Command, bad: str) -> None:
    result = command("data", "check", bad, *NANO, "--html", "page.html")
    assert result.code == 2
    assert "Cannot be trained on yet: 2 of 42 rows would stop a run." in result.out
    assert '1 row: message N has role "bot"' in result.out
    assert "→ rename the role, or --map role.bot=assistant" in result.out
    assert "20 rows: the same as an earlier one" in result.out
    assert "--on-bad-row skip" in result.out
    assert "page.html" in result.out
    assert "Cannot be trained on yet" in Path("page.html").read_text()
    lines = [line for line in result.out.splitlines() if "hymba-tune" not in line]
    assert max(map(cell_len, lines)) <= 60
    assert "\x1b" not in result.out


def test_next_commands_of_a_check_read_the_rows_as_it_did(command: Command, good: str) -> None:
    flags = ("--chat-template", "alpaca", "--learn", "last", "--escape-special-tokens")
    result = command("data", "check", good, *NANO, *flags)
    assert f"train   hymba-tune sft --data good.jsonl --model hymba-nano {' '.join(flags)} --max-length" in result.out
    assert f"look    hymba-tune data preview good.jsonl --model hymba-nano {' '.join(flags)}\n" in result.out
    assert command("data", "preview", good, *NANO, *flags).code == 0


def test_template_that_strips_thinking_is_checked_with_the_last_answers(command: Command) -> None:
    thought = "<think>\nadd\n</think>\n\n"
    talk = [{"role": role, "content": text} for role, text in (("user", "2?"), ("assistant", f"{thought}2"))] * 2
    Path("talks.jsonl").write_text(json.dumps({"messages": talk}))
    template = str(Path(__file__).parents[1] / "data" / "cases" / "strips_thinking.jinja")
    refused = command("data", "check", "talks.jsonl", *NANO, "--chat-template", template)
    assert refused.code == 2
    words = " ".join(refused.out.split())
    assert "around message N, an answer" in words
    assert "→ --learn last" in words
    assert command("data", "check", "talks.jsonl", *NANO, "--chat-template", template, "--learn", "last").code == 0


def test_check_prints_json(command: Command, bad: str) -> None:
    result = command("data", "check", bad, *NANO, "--json")
    assert result.code == 2
    facts = json.loads(result.out)
    assert (facts["rows"], facts["bad_rows"], facts["duplicates"]["rows"]) == (42, 2, 20)


def test_page_that_cannot_be_written_is_refused_at_once(command: Command, good: str) -> None:
    result = command("data", "check", good, *NANO, "--html", "no/page.html")
    assert result.code == 2
    assert "there is no folder no" in result.err


@pytest.mark.parametrize("verb", ["check", "preview"])
def test_missing_files_argument_is_refused(verb: str, command: Command) -> None:
    result = command("data", verb, *NANO)
    assert result.code == 2
    assert result.err.startswith("FILES are missing.")


def test_preview_marks_text_with_loss(command: Command, good: str, bad: str) -> None:
    result = command("data", "preview", good, "-n", 1, *NANO)
    assert result.code == 0
    assert "Count to 0.\n<extra_id_1>Assistant\n[0</s>]\n" in result.out
    assert " loss on " in result.out
    assert "good.jsonl, line 2" not in result.out
    result = command("data", "preview", bad, "--skip", 40, "--max-length", 8, *NANO)
    assert 'bad.jsonl, line 41\n cannot be used: message 2 has role "bot"' in result.out
    result = command(
        "data", "preview", bad, "--map", "role.bot=assistant", "--skip", 40, "-n", 1, "--max-length", 8, *NANO
    )
    assert "[␛[31mred</s>]" in result.out
    assert "tokens, cut to 8" in result.out


def test_preview_marks_the_answers_of_pairs(command: Command) -> None:
    Path("pairs.jsonl").write_text('{"prompt": "Is it?", "chosen": "Yes.", "rejected": "No."}\n')
    result = command("data", "preview", "pairs.jsonl", *NANO)
    assert "Is it?\n<extra_id_1>Assistant\nchosen [Yes.</s>]\nrejected [No.</s>]\n loss on " in result.out


def test_preview_is_bright_and_dim_on_a_terminal(command: Command, good: str, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Console(width=60, highlight=False, force_terminal=True, color_system="standard", _environ={})
    monkeypatch.setattr(data, "console", terminal)
    result = command("data", "preview", good, "-n", 1, *NANO)
    assert "\x1b[1;32m0</s>" in result.out
    assert "[0</s>]" not in result.out
    assert "\x1b[2m<s>" in result.out


def test_converted_and_split_data_passes_the_check(command: Command, bad: str) -> None:
    refused = command("data", "convert", bad, "--to", "alpaca", "--out", "a.csv")
    assert refused.code == 2
    assert 'Cannot use bad.jsonl, line 41: message 2 has role "bot".' in refused.err
    assert "--on-bad-row skip" in refused.err
    assert not Path("a.csv").exists()
    done = command("data", "convert", bad, "--to", "alpaca", "--out", "a.csv", "--on-bad-row", "skip", "--unique")
    assert done.code == 0, done.err
    assert done.out.splitlines() == [
        " 20 rows → a.csv",
        " 20 repeated rows left out",
        " 2 bad rows left out → a.csv.dropped.jsonl",
    ]
    divided = command("data", "split", "a.csv", "--eval", 0.2, "--out", "parts")
    assert divided.out.splitlines() == [
        " 16 rows → parts/train.jsonl",
        " 4 rows → parts/eval.jsonl",
        " next  hymba-tune sft --data parts/train.jsonl --eval-data parts/eval.jsonl",
    ]
    assert command("data", "check", "parts/train.jsonl", "parts/eval.jsonl", *NANO).code == 0
    assert "1 rows could not be read" not in divided.out
    skipped = command("data", "split", bad, "--out", "more", "--on-bad-row", "skip")
    assert "1 row could not be read and was left out" in skipped.out


def test_wrong_arguments_get_a_message(command: Command, good: str) -> None:
    result = command("data", "convert", good, "--to", "chatml", "--out", "a.jsonl")
    assert result.code == 2
    assert "chatml" in result.err
    assert "--eval 0: must be more than 0." in command("data", "split", good, "--out", "x", "--eval", 0).err
    assert "did you mean good.jsonl?" in command("data", "check", "god.jsonl", *NANO).err
    assert "at least 1" in command("data", "preview", good, "-n", 0).err


def test_clear_empties_the_cache(command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (cache_folder() / "entry").mkdir(parents=True)
    for kind in ("targets", "pairs"):
        cache_folder(kind).mkdir()
    (cache_folder("targets") / "key").mkdir()
    (cache_folder("targets") / "key" / "00000.arrow").write_bytes(bytes(2**20))
    (cache_folder("pairs") / "key.safetensors").write_bytes(bytes(2**21))
    cleared = command("data", "clear", "pairs").out
    assert cleared == f" tables of tokenizer pairs: 1 entry, 2.0 MB removed from {cache_folder('pairs')}\n"
    assert command("data", "clear").out == (
        f" encoded data: 1 entry, 0.0 MB removed from {cache_folder()}\n"
        f" teacher targets: 1 entry, 1.0 MB removed from {cache_folder('targets')}\n"
    )
    assert not [path for kind in tmp_path.glob("hymba-tune/*") for path in kind.iterdir()]

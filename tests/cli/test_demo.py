"""The demo's commands; tests/recipes/test_demo.py trains it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hymba_tune.cli import demo
from hymba_tune.cli.demo import steps
from hymba_tune.cli.main import app
from tests.cli.conftest import Command
from tests.conftest import ROOT


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands of the demo, which are not run."""
    commands: list[list[str]] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "_run", commands.append)
    return commands


def test_demo_prints_and_runs_commands_that_exist(ran: list[list[str]], command: Command) -> None:
    result = command("demo", "--out", "my runs/first")
    assert [words[0] for words in ran] == ["sft", "chat", "merge"]
    assert ran == steps(Path("my runs/first"))
    assert re.findall(r"^\$ hymba-tune (\w+)", result.out, re.M) == ["sft", "chat", "merge"]
    assert "\n$ hymba-tune merge 'my runs/first' --out 'my runs/first-merged'\n" in result.out
    for words in ran:
        app.parse_args(words, exit_on_error=False, print_error=False)


def test_demo_takes_the_next_free_name_and_replaces_nothing(ran: list[list[str]], command: Command) -> None:
    for name in ("demo", "demo-2-merged"):
        Path("runs", name).mkdir(parents=True)
        Path("runs", name, "notes.txt").touch()
    command("demo")
    assert ran == steps(Path("runs/demo-3"))


@pytest.mark.parametrize("taken", ["mine", "mine-merged"])
def test_demo_refuses_a_folder_that_holds_something(taken: str, ran: list[list[str]], command: Command) -> None:
    Path(taken).mkdir()
    Path(taken, "notes.txt").touch()
    result = command("demo", "--out", "mine")
    assert result.code == 2
    assert f"--out mine: {taken} exists." in result.err
    assert ran == []


@pytest.mark.parametrize("out", [".", "..", "/"])
def test_demo_needs_a_name_for_its_folder(out: str, ran: list[list[str]], command: Command) -> None:
    result = command("demo", "--out", out)
    assert result.code == 2
    assert f"--out {out} names no new folder." in result.err
    assert ran == []


def test_demo_says_at_once_that_its_folder_cannot_be_written(ran: list[list[str]], command: Command) -> None:
    Path("runs").touch()
    result = command("demo")
    assert result.code == 2
    assert "--out runs/demo-merged cannot be written: Not a directory." in result.err
    assert "  to fix     hymba-tune demo --out DIR, in a folder that can be written" in result.err
    assert ran == []


def test_make_demo_is_the_demo() -> None:
    recipe = re.findall(r"^demo: .*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert recipe == ["\t$(BIN)/hymba-tune demo\n"]

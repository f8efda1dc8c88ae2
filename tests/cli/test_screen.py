from __future__ import annotations

import io
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from hymba_tune.cli import screen as screens
from hymba_tune.cli.screen import MOVES, RichScreen, SafeConsole, loading
from hymba_tune.train.screen import MetricsRow


def test_table_fits_60_columns(capsys: pytest.CaptureFixture[str]) -> None:
    screen = RichScreen()
    row = MetricsRow(99_999, 12.345, None, 2e-4, 1.0, 123_456.0, 139 * 2**30)
    screen.row(row, total_steps=99_999, seconds_left=86_400)
    screen.row(MetricsRow(99_999, eval_loss=12.345), total_steps=99_999, seconds_left=None)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert max(map(cell_len, lines)) <= 60


def test_columns_stand_under_their_names(capsys: pytest.CaptureFixture[str]) -> None:
    screen = RichScreen()
    screen.row(MetricsRow(3, 1.5, 1.25, 2e-4, 1.0, 1234.4, 2**30), total_steps=9, seconds_left=59.6)
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == ["step", "loss", "eval", "lr", "tok/s", "mem", "left"]
    assert row.split() == ["3/9", "1.500", "1.250", "2.0e-04", "1,234", "1.0", "GB", "60", "s"]
    assert len(row) == len(header)


def test_preferences_have_columns_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    screen = RichScreen()
    row = MetricsRow(99_999, loss=12.345, tokens_per_s=123_456.0, margin=-12.3456, accuracy=1.0, chosen_reward=1.0)
    screen.row(row, total_steps=99_999, seconds_left=86_400)
    screen.row(
        MetricsRow(99_999, eval_loss=0.5, eval_margin=1.5, eval_accuracy=0.625), total_steps=99_999, seconds_left=None
    )
    header, trained, evaluated = capsys.readouterr().out.splitlines()
    assert header.split() == ["step", "loss", "eval", "margin", "acc", "tok/s", "left"]
    assert trained.split()[1:4] == ["12.345", "-12.346", "100%"]
    assert evaluated.split()[1:] == ["0.500", "1.500", "62%"]
    assert max(map(cell_len, (header, trained, evaluated))) <= 60


@pytest.mark.parametrize(("seconds", "words"), [(59, "59 s"), (90, "2 min"), (5399, "90 min"), (7200, "2.0 h")])
def test_time_to_go(seconds: float, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    RichScreen().row(MetricsRow(1, loss=1.0), total_steps=9, seconds_left=seconds)
    assert capsys.readouterr().out.rstrip().endswith(words)


def test_evaluations_say_whether_it_got_better(capsys: pytest.CaptureFixture[str]) -> None:
    screen = RichScreen()
    for step, loss in enumerate((2.0, 1.5, 1.75)):
        screen.row(MetricsRow(step, eval_loss=loss), total_steps=9, seconds_left=None)
    assert [line.split()[1:] for line in capsys.readouterr().out.splitlines()[1:]] == [
        ["2.000"],
        ["1.500", "▼"],
        ["1.750", "▲"],
    ]


def test_losses_of_several_sources_stand_below_their_mean(capsys: pytest.CaptureFixture[str]) -> None:
    """In as many lines as it takes, none of which tears a name from its loss."""
    screen = RichScreen()
    names = [f"source number {i}.jsonl" for i in range(4)]
    for step, loss in enumerate((2.0, 1.5)):
        more = {f"eval_loss/{name}": loss + i for i, name in enumerate(names)}
        screen.row(MetricsRow(step, eval_loss=loss, more=more), total_steps=9, seconds_left=None)
    lines = capsys.readouterr().out.splitlines()
    below = [line for line in lines if "source" in line]
    assert max(map(cell_len, below)) <= 80
    items = " · ".join(line.strip(" ·") for line in below).split(" · ")
    assert items == [f"{name} {i + 2:.3f}" for i, name in enumerate(names)] + [
        f"{name} {i + 1.5:.3f} ▼" for i, name in enumerate(names)
    ]


def test_banner_folds_long_lines_next_to_their_labels(capsys: pytest.CaptureFixture[str]) -> None:
    RichScreen().banner({"data": "word " * 40, "run": "runs/[mine]"})
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith(" data  word")
    assert lines[1].startswith("       word")
    assert " run   runs/[mine]" in [line.rstrip() for line in lines]


def test_long_work_is_printed_where_no_spinner_can_turn(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter((0.0, 1.0, 10.0, 15.2))
    monkeypatch.setattr("hymba_tune.cli.screen.time.monotonic", lambda: next(clock))
    screen = RichScreen()
    for label in ("quick", "slow"):
        with screen.working(label) as progress:
            progress(10)
    assert capsys.readouterr().out == " slow · 5 s\n"


def test_note_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    RichScreen().note("[x]")
    assert capsys.readouterr().out == " [x]\n"


def test_progress_says_how_fast_it_is_once_that_means_something(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hymba_tune.cli.screen.time.monotonic", lambda: 12.0)
    assert screens._progress("reading", 99, 10.0) == "reading · 99"
    assert screens._progress("reading", 5000, 10.0) == "reading · 5,000 · 2,500 a second"


def test_progress_of_so_many_says_how_long_it_still_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hymba_tune.cli.screen.time.monotonic", lambda: 130.0)
    assert screens._progress("asking", 0, 10.0, 1500) == "asking · 0 of 1,500"
    assert screens._progress("asking", 500, 10.0, 1500) == "asking · 500 of 1,500 · 4 min to go"
    assert screens._progress("asking", 500, 129.0, 1500) == "asking · 500 of 1,500"


CONTROLS = st.sampled_from("\x1b\x9b\x07\r\b\x00\u202e\u2066\ud800")
ANY_TEXT = st.text(st.characters() | CONTROLS | st.sampled_from("]0;[2Jm"))


@given(ANY_TEXT)
def test_no_text_controls_the_terminal(text: str) -> None:
    """Neither as a string nor styled, in a cell, as a title, in JSON, or below a spinner."""
    file = io.StringIO()
    console = SafeConsole(file=file, width=40)
    table = Table(title=Text(text))
    table.add_column(text)
    table.add_row(Text(text))
    for written in (text, Text(text, style="bold red"), table):
        console.print(written, markup=False)
        console.print(written, markup=False, soft_wrap=True, end="")
    with console.status(Text(text)):
        console.print_json(data={"text": text})
    assert MOVES.findall(file.getvalue()) == []


def test_own_styles_reach_the_terminal() -> None:
    file = io.StringIO()
    SafeConsole(file=file, force_terminal=True, color_system="standard").print(Text("a\x1b[31mb", style="bold"), end="")
    assert file.getvalue() == "\x1b[1ma␛[31mb\x1b[0m"


def test_imports_that_take_seconds_are_announced(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with loading():
        pass
    monkeypatch.delitem(sys.modules, "torch")
    with loading():
        shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", " loading torch and transformers\n")

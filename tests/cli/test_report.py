from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Command
from tests.report.inputs import write_run


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_runs_report_is_written_and_its_answer_said(command: Command) -> None:
    write_run(Path("mine"), [3.0, 2.0, 1.0], [4.0, 2.0, 1.0, 1.5])
    result = command("report", "mine")
    assert result.code == 0
    assert not result.err
    assert "It got better: held-out loss 4.000 → 1.500 nats a token, 62 % less." in result.out
    assert "perplexity" in result.out
    assert "the held-out loss rose again" in result.out
    assert "open it in a browser: mine/report.html" in result.out
    assert Path("mine/report.html").is_file()


def test_runs_are_compared(command: Command) -> None:
    for name, loss in (("one", 2.0), ("two", 1.0)):
        write_run(Path(name), [3.0], [4.0, loss], facts={"seconds": 5.0})
    result = command("report", "one", "two")
    assert result.code == 0
    assert result.out.splitlines()[0].strip().startswith("B is best, with the lowest held-out loss")
    rows = [line.split() for line in result.out.splitlines()]
    assert ["A", "one", "B", "two"] in rows
    assert ["steps", "10", "10"] in rows
    assert "open it in a browser: compare.html" in result.out
    assert command("report", "one", "two", "--out", "other.html").code == 0
    assert Path("compare.html").read_text() == Path("other.html").read_text()


def test_what_is_wrong_is_said_in_one_message(command: Command) -> None:
    write_run(Path("mine"), [1.0])
    for words, message in (
        (["nowhere"], "nowhere is not a run: it has no config.yaml."),
        (["mine", "nowhere"], "nowhere is not a run"),
        (["mine", "--out", "nowhere/x.html"], "--out nowhere/x.html: there is no folder nowhere."),
    ):
        result = command("report", *words)
        assert result.code == 2
        assert message in result.err
        assert not result.out
    assert command("report", "mine", "--out", "x.html").code == 0
    assert Path("x.html").is_file()
    assert not Path("mine/report.html").exists()

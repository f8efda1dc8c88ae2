"""`hymba-tune distill capture`: what it says when it is done."""

from __future__ import annotations

from pathlib import Path

import pytest
from cyclopts import App

from hymba_tune.cli.distill_capture import capture
from tests.distill.teachers import save_teacher


def test_says_where_the_targets_are_and_what_they_take(
    questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    app = App(result_action="return_value")
    app.command(capture)
    words = ["capture", "--model", "hymba-nano", "--teacher", str(save_teacher(tmp_path / "teacher"))]
    words += ["--data", str(questions), "--teacher-cache", str(tmp_path / "targets"), "--min-teacher-probability", "0"]
    words += ["--min-end-probability", "0"]
    app(words)
    out = " ".join(capsys.readouterr().out.split())
    assert f"targets of 24 rows are in {tmp_path / 'targets'}" in out
    assert "bytes a token" in out
    assert "next hymba-tune distill" in out

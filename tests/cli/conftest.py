from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from rich.console import Console

from hymba_tune.cli.main import app, main
from hymba_tune.cli.screen import console, error_console


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


Command = Callable[..., Result]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs `hymba-tune` with some words, its output piped."""

    def call(*words: object) -> Result:
        capsys.readouterr()
        app.console = Console()  # cyclopts would keep the one of the first call, with its width
        try:
            with pytest.raises(SystemExit) as ended:
                main([str(word) for word in words])
        finally:
            console.quiet = error_console.quiet = False  # of a process that is not the first
        output = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Result(ended.value.code, output.out, output.err)

    return call

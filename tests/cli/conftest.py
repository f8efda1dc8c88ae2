from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from hymba_tune.cli.main import main


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
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        output = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Result(ended.value.code, output.out, output.err)

    return call

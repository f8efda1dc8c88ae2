from __future__ import annotations

from pathlib import Path

import pytest

from hymba_tune.errors import ConfigError
from hymba_tune.ranks import SIZES, check_single_process
from tests.runs import run, settings


@pytest.mark.parametrize("name", SIZES)
def test_one_of_several_processes_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "2")
    with pytest.raises(ConfigError, match=rf"runs in a single process, and a launcher .* has started 2 \({name}\)\."):
        check_single_process()


@pytest.mark.parametrize("size", ["", "0", "1", "many"])
def test_a_single_process_may_have_a_launcher(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SIZES:
        monkeypatch.setenv(name, size)
    check_single_process()


def test_run_is_refused_to_those_who_call_it_from_python(
    small_model: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="runs in a single process"):
        run(settings(small_model, questions, tmp_path / "out"))
    assert not (tmp_path / "out").exists()

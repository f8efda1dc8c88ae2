from __future__ import annotations

import pytest

from hymba_tune.cli.main import ANYWHERE, IN_SEVERAL_PROCESSES, VERBS
from hymba_tune.distributed.environment import SIZES, check_single_process
from hymba_tune.errors import ConfigError
from tests.cli.conftest import Command, command

__all__ = ["command"]
REFUSED = sorted(VERBS.keys() - {*IN_SEVERAL_PROCESSES, *ANYWHERE})


@pytest.mark.parametrize("name", SIZES)
def test_one_of_several_processes_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "2")
    with pytest.raises(ConfigError, match=rf"chat runs in a single process, and a launcher .* has started 2 \({name}"):
        check_single_process("chat")


@pytest.mark.parametrize("size", ["", "0", "1", "many"])
def test_a_single_process_may_have_a_launcher(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SIZES:
        monkeypatch.setenv(name, size)
    check_single_process("chat")


def test_the_verbs_of_a_single_process_are_those_that_do_not_train_and_grpo() -> None:
    assert [
        *("chat", "data", "demo", "eval", "export", "grpo", "merge", "plan", "quantize", "report", "serve")
    ] == REFUSED


@pytest.mark.parametrize("verb", REFUSED)
def test_verb_of_a_single_process_is_refused_by_name(
    verb: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = command(verb)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith(f"hymba-tune {verb} runs in a single process")


def test_only_one_process_says_it(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    result = command("chat")
    assert (result.code, result.out, result.err) == (2, "", "")

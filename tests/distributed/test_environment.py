from __future__ import annotations

import pytest

from hymba_tune.distributed.environment import SIZES, check_single_process
from hymba_tune.errors import ConfigError


@pytest.mark.parametrize("name", SIZES)
def test_one_of_several_processes_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "2")
    with pytest.raises(
        ConfigError, match=rf"hymba-tune chat runs in a single process, and a launcher .* has started 2 \({name}\)\."
    ):
        check_single_process("chat")


@pytest.mark.parametrize("size", ["", "0", "1", "many"])
def test_a_single_process_may_have_a_launcher(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SIZES:
        monkeypatch.setenv(name, size)
    check_single_process("chat")

"""How many processes a command runs in, and with which settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hymba_tune.cli import processes
from hymba_tune.cli.processes import capture_in_processes, if_restarted, train_in_processes
from hymba_tune.cli.training import read_settings
from hymba_tune.config import DistillCaptureConfig, LaunchOptions, SFTConfig
from hymba_tune.distributed import checks
from hymba_tune.distributed.launch import ERRORS, read_ending
from hymba_tune.errors import ConfigError
from hymba_tune.files.sealing import seal
from hymba_tune.train.resuming import CHANGEABLE
from tests.cli.conftest import Command


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """What is launched, on a machine with four GPUs."""
    calls: list[Any] = []
    monkeypatch.setattr(processes, "launch", lambda *arguments, **more: calls.append((*arguments, more)))
    monkeypatch.setattr(checks, "count_gpus", lambda: 4)
    monkeypatch.chdir(tmp_path)
    return calls


def settings(**changes: Any) -> SFTConfig:
    return SFTConfig.model_validate({"model": "hymba-nano", "data": ["demo"]} | changes)


def test_one_process_is_not_launched(launched: list[Any]) -> None:
    assert train_in_processes(settings()) == settings()
    assert not launched


def test_folder_of_the_run_is_chosen_before_the_processes_start(launched: list[Any]) -> None:
    with pytest.raises(SystemExit):
        train_in_processes(settings(nproc="auto", global_batch=64))
    verb, given, number, more = launched.pop()
    assert (verb, number) == ("sft", 4)
    assert given.out is not None
    assert more == {"run": given.out}
    assert (given.batch_size, given.grad_accum) == (8, 2)
    with pytest.raises(SystemExit):
        train_in_processes(settings(nproc="2", out="mine"))
    assert launched.pop()[1].out == Path("mine")


@pytest.mark.parametrize("changes", [{"strategy": "fsdp"}, {"max_restarts": 1}])
def test_one_process_is_launched_where_it_needs_it(changes: dict[str, Any], launched: list[Any]) -> None:
    with pytest.raises(SystemExit):
        train_in_processes(settings(**changes))
    assert launched.pop()[2] == 1


def test_machines_need_the_name_of_the_run(launched: list[Any]) -> None:
    several = {"nnodes": 2, "rendezvous": "here:29500"}
    with pytest.raises(ConfigError, match="--nnodes 2 needs --out"):
        train_in_processes(settings(**several))
    with pytest.raises(SystemExit):
        train_in_processes(settings(**several, nproc="2", out="mine"))
    assert launched.pop()[2] == 2


def test_a_started_process_starts_no_others(launched: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert train_in_processes(settings(nproc="4", global_batch=32)).grad_accum == 2
    capture_in_processes("distill capture", DistillCaptureConfig(), "auto")
    assert not launched


def test_capture_is_launched(launched: list[Any]) -> None:
    capture_in_processes("distill capture", DistillCaptureConfig(), "auto")
    assert not launched
    with pytest.raises(SystemExit):
        capture_in_processes("distill capture", DistillCaptureConfig(nproc="3"), "auto")
    assert launched.pop()[2] == 3


def test_worker_takes_the_settings_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = settings(out=tmp_path)
    monkeypatch.setattr(processes, "settings_of_parent", lambda: given)
    monkeypatch.setattr(processes.watch, "start", lambda: None)
    assert read_settings("no such recipe", SFTConfig()) is given


def test_restarted_run_goes_on_from_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    (run / "checkpoints" / "checkpoint-5").mkdir(parents=True)
    (run / "checkpoints" / "checkpoint-5" / "weights").touch()
    seal(run / "checkpoints" / "checkpoint-5")
    (run / "config.yaml").write_text("lr: 0.004\nepochs: 3\n")  # the run's own defaults
    given = settings(out=run, max_restarts=2)
    assert if_restarted(given) is given
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    again = if_restarted(given)
    assert (again.resume, again.out) == (run, None)
    assert (again.lr, again.epochs) == (0.004, 3)
    assert "a process has died; restart 1 of 2, from " in capsys.readouterr().err
    resumed = settings(resume=run)
    assert if_restarted(resumed) is resumed
    fresh = if_restarted(settings(out=tmp_path))
    assert (fresh.out, fresh.resume, fresh.overwrite) == (tmp_path, None, True)


def test_settings_that_start_processes_may_change_on_resuming() -> None:
    assert LaunchOptions.model_fields.keys() <= CHANGEABLE


def test_mistake_in_a_worker_is_left_to_the_first_process(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ERRORS, str(tmp_path / "error"))
    result = command("recipes", "show", "gone")
    assert (result.code, result.err) == (0, "")
    ending = read_ending(tmp_path / "error")
    assert ending is not None
    assert (ending.code, ending.rank) == (2, 0)
    assert ending.message.startswith("There is no recipe gone.")

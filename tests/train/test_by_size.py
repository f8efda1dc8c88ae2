"""The learning rate and the epochs that a run has where its user sets none."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import yaml

from hymba_tune.config import DistillConfig, DPOConfig, GRPOConfig, ORPOConfig, SFTConfig, TrainingConfig
from hymba_tune.report import RunRecord
from hymba_tune.report.commands import chosen, repeat
from hymba_tune.train.arguments import evaluation_batch
from hymba_tune.train.banner import short_rate
from hymba_tune.train.by_size import default_epochs, default_rate, factor
from hymba_tune.train.resuming import resume_config
from tests.runs import run, settings

RELEASED, NANO = 1_522_797_824, 3_596_232


def test_the_released_model_has_the_defaults_of_the_settings() -> None:
    for config in (SFTConfig(), SFTConfig(method="full"), DPOConfig(), GRPOConfig(reward=["exact"]), DistillConfig()):
        assert default_rate(config, RELEASED) == config.learning_rates[config.method]
        assert default_epochs(config, RELEASED, steps_per_epoch=1) == 1


@pytest.mark.parametrize(
    ("config", "rate"),
    [(SFTConfig(), 4e-3), (SFTConfig(method="full"), 4e-4), (DPOConfig(), 1e-3), (ORPOConfig(), 2e-3)],
)
def test_small_models_have_higher_rates(config: TrainingConfig, rate: float) -> None:
    assert default_rate(config, NANO) == rate
    resumed = config.model_copy(update={"resume": Path("runs/old")})
    assert default_rate(resumed, NANO) == config.learning_rates[config.method]


def test_the_factor_falls_with_the_size() -> None:
    factors = [factor(size) for size in (10**5, 10**7, 10**8, 10**9, 10**10)]
    assert factors == sorted(factors, reverse=True)
    assert (factors[0], factors[-1]) == (20, 1)


@pytest.mark.parametrize(("per_epoch", "epochs"), [(1, 50), (3, 50), (6, 34), (24, 9), (162, 2), (1000, 1)])
def test_few_rows_are_repeated(per_epoch: int, epochs: float) -> None:
    assert default_epochs(SFTConfig(), NANO, per_epoch) == epochs
    assert default_epochs(DPOConfig(), NANO, per_epoch) == 1


def test_rates_are_written_as_people_do() -> None:
    assert [short_rate(rate) for rate in (4e-3, 2.5e-4, 1.0)] == ["4e-3", "2.5e-4", "1e0"]


def test_a_run_keeps_its_defaults(small_model: Path, questions: Path, tmp_path: Path) -> None:
    unset: dict[str, Any] = {"lr": None, "steps": None, "batch_size": 24, "eval_every": 1, "save_every": 1}
    with patch("hymba_tune.train.by_size.LEAST_STEPS", 0.1):
        finished = run(settings(small_model, questions, tmp_path / "run", **unset))
    written = yaml.safe_load((finished.path / "config.yaml").read_text())
    assert (written["lr"], written["epochs"], finished.facts()["steps"]) == (4e-3, 2, 2)

    record = RunRecord.read(finished.path)
    assert not {"lr", "epochs"} & chosen(record).keys()
    assert "--lr" not in repeat(record)

    resumed = resume_config(SFTConfig(resume=finished.path, epochs=3))
    assert (resumed.lr, resumed.epochs) == (4e-3, 3)
    assert run(resumed).facts()["steps"] == 3
    assert RunRecord.read(finished.path).facts["by_size"] == ["epochs", "lr"]


def test_held_out_batches_do_not_depend_on_the_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert evaluation_batch(SFTConfig(batch_size=8), 100) == 5
    assert evaluation_batch(SFTConfig(batch_size=8), 7) == 1
    assert evaluation_batch(DPOConfig(batch_size=8, loss="aot"), 7) == 8  # its loss is that of a batch

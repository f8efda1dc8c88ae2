from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hymba_tune.errors import TrainingError
from hymba_tune.report import RunRecord, judge
from hymba_tune.train.screen import MetricsRow, Screen
from tests.runs import run, settings


class Breaking(Screen):
    """Raises an error, or presses Ctrl-C, at a step's row; records the notes."""

    def __init__(self, step: int = 0, error: Exception | None = None) -> None:
        self._step, self._error = step, error
        self.notes: list[str] = []

    def row(self, row: MetricsRow, *, total_steps: int, seconds_left: float | None) -> None:
        del total_steps, seconds_left
        if row.step == self._step and row.loss is not None:
            if self._error is not None:
                raise self._error
            signal.raise_signal(signal.SIGINT)

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(autouse=True)
def _ctrl_c_interrupts() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any], str]:
    facts, updates = (json.loads((path / name).read_text()) for name in ("run.json", "updates.json"))
    return facts["ended"], updates, (path / "report.html").read_text()


def test_finished_run_records_how_far_each_part_moved(finished_run: Path) -> None:
    ended, updates, page = read(finished_run)
    assert ended == {"how": "finished", "what": ""}
    assert "finished at step 30" in page
    groups = {part["group"] for part in updates["parts"]}
    assert groups == {"attention", "SSM", "attention + SSM", "MLP", "meta tokens"}
    assert all(0 < part["size"] < 10 for part in updates["parts"])


def test_finished_run_records_what_its_verdict_needs(finished_run: Path) -> None:
    facts = json.loads((finished_run / "run.json").read_text())
    assert facts["vocabulary"] == 4096
    assert facts["held_out"]["rows"] == 5
    assert len(facts["held_out"]["fingerprint"]) == 64
    assert facts["settings"]["rank"] == 4
    assert {"tensors", "bytes", "sampled", "whole"} == facts["base_digest"].keys()


def test_loss_stuck_at_a_uniform_guess_is_noted(small_model: Path, questions: Path, tmp_path: Path) -> None:
    """An exit code of 0 does not mean that anything was learned."""
    config = settings(
        small_model, questions, tmp_path / "out", steps=20, lr=1e6, log_every=5, eval_every=10, warmup=0.0
    )
    verdict = judge(RunRecord.read(run(config).path))
    assert not verdict.better
    assert any("stuck at 8.318, about ln(4,096) = 8.318" in note for note in verdict.notes)


def test_interrupted_run_has_a_report(small_model: Path, questions: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(settings(small_model, questions, tmp_path / "out", steps=9, save_every=9), Breaking(2), report=True)
    ended, updates, page = read(tmp_path / "out")
    assert ended["how"] == "interrupted"
    assert "interrupted at step" in page
    assert "The run ended before this prompt was answered again." in page
    assert f"hymba-tune sft --resume {tmp_path / 'out'}" in re.sub(r"<[^>]+>", "", page)
    assert updates["parts"]


def test_failed_run_has_a_report_once_there_is_a_checkpoint(small_model: Path, questions: Path, tmp_path: Path) -> None:
    error = TrainingError("The loss is <NaN>.", fix="a lower --lr")
    for step, left in ((1, False), (3, True)):
        out = tmp_path / str(step)
        with pytest.raises(TrainingError, match="The loss is <NaN>"):
            run(settings(small_model, questions, out, steps=9, save_every=2), Breaking(step, error), report=True)
        assert out.exists() is left
    ended, _, page = read(tmp_path / "3")
    assert ended == {"how": "failed", "what": str(error)}
    assert "failed at step 3" in page
    assert "The loss is &lt;NaN&gt;." in page


def test_report_that_fails_loses_nothing(
    small_model: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("hymba_tune.report.write_report", fail)
    monkeypatch.setattr("hymba_tune.train.ending.adapter_updates", fail)
    screen = Breaking()
    finished = run(settings(small_model, questions, tmp_path / "out"), screen, report=True)
    assert (finished.adapter / "adapter_model.safetensors").is_file()
    assert finished.facts()["ended"]["how"] == "finished"
    assert screen.notes == [f"{name} could not be written: no space left" for name in ("updates.json", "report.html")]
    assert "no space left" in (finished.path / "log.txt").read_text()


def test_full_training_is_measured_only_against_weights_that_are_saved(
    small_model: Path, questions: Path, finished_run: Path, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"method": "full", "lr": 1e-3}
    plain = run(settings(small_model, questions, tmp_path / "plain", **changes), report=True)
    _, updates, _ = read(plain.path)
    assert {part["part"] for part in updates["parts"]} >= {"q", "conv1d", "A_log", "embed_tokens", "memory_tokens"}
    on_top = run(settings(finished_run, questions, tmp_path / "on-top", **changes), report=True)
    _, updates, page = read(on_top.path)
    assert updates == {"absent": "not measured: the initial weights, with the first adapter merged, are not saved"}
    assert "with the first adapter merged, are not saved" in page

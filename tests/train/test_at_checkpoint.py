"""A stopped run can be used from its checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from hymba_tune.adapters import open_model, quantized_base
from hymba_tune.config import ChatConfig, EvalConfig, ExportConfig, MergeConfig, QuantizeConfig, ServeConfig, SFTConfig
from hymba_tune.errors import CheckpointError, ConfigError
from hymba_tune.evaluate import add_to_run, evaluate, run_of
from hymba_tune.files import seal
from hymba_tune.files.checkpoints import at_checkpoint
from hymba_tune.generate import ChatSession
from hymba_tune.hub import export, merge
from hymba_tune.inputs import check_inputs
from hymba_tune.registry import resolve_model, run_directory
from tests.hub.silent import silent
from tests.runs import run, same_tensors, settings, tensors


def write_run(path: Path, losses: dict[int, float | None]) -> Path:
    """A run with checkpoints after these steps, and their held-out losses."""
    for step in losses:
        (path / f"checkpoints/checkpoint-{step}").mkdir(parents=True)
        (path / f"checkpoints/checkpoint-{step}/weights").write_text("x")
        seal(path / f"checkpoints/checkpoint-{step}")
    rows = [{"step": step, "eval_loss": loss} for step, loss in losses.items() if loss is not None]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"step": 5, "eval_loss": 0}]))
    (path / "config.yaml").write_text("verb: sft\n")
    return path


@pytest.mark.parametrize(("which", "step"), [("last", 30), ("best", 20), ("10", 10), ("30", 30)])
def test_checkpoint_is_the_last_the_best_or_that_of_a_step(which: str, step: int, tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", {10: 3.0, 20: 1.0, 30: 2.0})
    assert at_checkpoint(str(path), which) == str(path / f"checkpoints/checkpoint-{step}")
    assert at_checkpoint("anything", None) == "anything"


def test_what_is_no_checkpoint_is_said(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", {10: None, 20: None})
    (path / "checkpoints/checkpoint-20/weights").write_text("y")  # torn
    assert at_checkpoint(str(path), "last").endswith("checkpoint-10")
    for which, message in (
        ("20", r"--checkpoint 20: .* is there, or it is incomplete\.\n.*one of the steps 10"),
        ("best", r"--checkpoint best: no such checkpoint of .*run has a held-out loss\.\n.*steps 10"),
    ):
        with pytest.raises(CheckpointError, match=message):
            at_checkpoint(str(path), which)
    with pytest.raises(ConfigError, match=r"--checkpoint first: no such checkpoint\.\n.*last, best, or a step"):
        at_checkpoint(str(path), "first")
    with pytest.raises(CheckpointError, match=r"hymba-nano is not a run: it has no config\.yaml\.(.|\n)*leave --check"):
        check_inputs(MergeConfig(model="hymba-nano", checkpoint="last", out=tmp_path / "out"))
    shutil.rmtree(path / "checkpoints")
    with pytest.raises(CheckpointError, match=r"(.|\n)*no complete checkpoint is left"):
        at_checkpoint(str(path), "last")


@pytest.fixture(scope="module")
def stopped(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after its last checkpoint."""
    path = tmp_path_factory.mktemp("stopped") / "stopped"
    return Path(shutil.copytree(finished_run, path, ignore=shutil.ignore_patterns("adapter")))


def test_stopped_run_is_merged_exported_and_evaluated_as_the_finished_one(
    stopped: Path, finished_run: Path, questions: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"has no model yet(.|\n)*--checkpoint last"):
        check_inputs(ChatConfig(model=str(stopped)))
    choice: dict[str, Any] = {"model": str(stopped), "checkpoint": "last"}
    merge(MergeConfig(model=str(finished_run), out=tmp_path / "whole", dtype="float32"), silent)
    merge(MergeConfig(**choice, out=tmp_path / "merged", dtype="float32"), silent)
    assert same_tensors(tmp_path / "merged", tmp_path / "whole")
    export(ExportConfig(**choice, out=tmp_path / "exported", license="mit"), silent)
    assert same_tensors(tmp_path / "exported", tmp_path / "whole")
    assert "hymba-tune sft" in (tmp_path / "exported/README.md").read_text()
    config = EvalConfig(**choice, data=[str(questions)], dtype="float32", max_rows=4)
    result = evaluate(config, silent)
    assert result.results[0].name == "stopped-checkpoint-30"
    assert run_of(config) == stopped
    add_to_run(result, stopped)
    assert "stopped-checkpoint-30" in (stopped / "evaluations.json").read_text()


def test_stopped_run_can_be_talked_to(stopped: Path) -> None:
    session = ChatSession(ChatConfig(model=str(stopped), checkpoint="20", dtype="float32", max_new_tokens=3))
    assert [chat.name for chat in session.chats] == ["stopped-checkpoint-20"]


def test_checkpoint_knows_the_weights_it_was_trained_on(wide_model: Path, questions: Path, tmp_path: Path) -> None:
    """Which its folder alone does not say."""
    path = run(settings(wide_model, questions, tmp_path / "run", quantize="nf4", eval_split=0)).path
    source = resolve_model(at_checkpoint(str(path), "last"))
    assert run_directory(source.folder) == path
    base, finished = quantized_base(source), quantized_base(resolve_model(str(path)))
    assert base is not None
    assert finished is not None
    assert (base.scheme, base.dtype) == (finished.scheme, finished.dtype)


def test_checkpoint_of_full_training_is_a_model(small_model: Path, questions: Path, tmp_path: Path) -> None:
    path = run(settings(small_model, questions, tmp_path / "run", method="full", eval_split=0)).path
    source = resolve_model(at_checkpoint(str(path), "last"))
    assert (source.name, source.adapter) == ("run-checkpoint-2", None)
    open_model(source, dtype=torch.float32, device=torch.device("cpu"))
    assert tensors(source.folder).keys() == tensors(path / "model").keys()


def test_every_verb_that_uses_a_model_takes_a_checkpoint() -> None:
    for kind in (ChatConfig, EvalConfig, ServeConfig, MergeConfig, ExportConfig, QuantizeConfig):
        assert "checkpoint" in kind.model_fields
    assert "checkpoint" not in SFTConfig.model_fields

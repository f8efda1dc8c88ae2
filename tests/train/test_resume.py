"""A run that was stopped and resumed ends with the weights of an uninterrupted run."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from hymba_tune.config import SFTConfig
from hymba_tune.errors import CheckpointError, ConfigError, DataError
from hymba_tune.files import WHOLE
from hymba_tune.train.resuming import resume_config
from hymba_tune.train.run import Run
from hymba_tune.train.screen import Screen
from tests.runs import merge_run, run, same_tensors, save_questions, settings, tensors
from tests.train.inputs import Pressing

METHODS: dict[str, dict[str, Any]] = {
    "lora_dropout": {"lora_dropout": 0.3, "grad_accum": 2},
    "packing": {"packing": True, "max_length": 64, "meta_tokens": "full"},
    "dora_bfloat16": {"method": "dora", "dtype": "bfloat16", "meta_tokens": "full"},
    "attention_rows": {"targets": ["attention"], "weight_decay": 0.1, "meta_tokens": "frozen"},
    # An evaluation lies before the checkpoint and another after it: none may change the gradients that follow.
    "nf4_bfloat16": {"quantize": "nf4", "dtype": "bfloat16", "lora_dropout": 0.3},
    "int8": {"quantize": "int8"},
    "full": {"method": "full", "weight_decay": 0.1},
    "full_bfloat16": {"method": "full", "dtype": "bfloat16"},
}


def result(finished: Run) -> Path:
    return finished.model if finished.model.is_dir() else finished.adapter


def losses(finished: Run) -> list[tuple[int, float | None, float | None]]:
    return [(row.step, row.loss, row.eval_loss) for row in finished.rows()]


def resumed(path: Path, **changes: Any) -> Run:
    return run(resume_config(SFTConfig(resume=path, **changes)))


class Noting(Screen):
    """Records the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.parametrize("method", METHODS)
def test_resumed_equals_uninterrupted(method: str, small_model: Path, questions: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"steps": 5, "save_every": 3, "eval_every": 3} | METHODS[method]
    whole = run(settings(small_model, questions, tmp_path / "whole", **changes))
    killed = Path(shutil.copytree(whole.path, tmp_path / "killed"))
    # As if killed while the last checkpoint was written: the one before is taken.
    for folder in ("adapter", "model"):
        shutil.rmtree(killed / folder, ignore_errors=True)
    torn = killed / "checkpoints/checkpoint-5"
    (torn / WHOLE).unlink()
    for file in torn.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:100])
    assert Run(killed).last_checkpoint().name == "checkpoint-3"

    finished = resumed(killed)
    assert same_tensors(result(finished), result(whole))
    assert losses(finished) == losses(whole)
    assert finished.facts()["tokens_seen"] == whole.facts()["tokens_seen"]


@pytest.fixture(autouse=True)
def _ctrl_c_interrupts() -> Iterator[None]:
    """Also where the tests run in the background of a shell, which lets them ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def stopped(small_model: Path, questions: Path, tmp_path: Path) -> Path:
    """A run of four steps that Ctrl-C stopped after two."""
    out = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt, match="stopped"):
        run(settings(small_model, questions, out, steps=4, save_every=4, eval_every=4), Pressing(2))
    return out


def test_interrupted_run_saves_its_step_and_can_be_resumed(
    stopped: Path, small_model: Path, questions: Path, tmp_path: Path
) -> None:
    # Ctrl-C comes with the row of step 2, after the check of that step: the run stops after the next one.
    assert Run(stopped).last_checkpoint().name == "checkpoint-3"
    assert not (stopped / "adapter").exists()
    whole = run(settings(small_model, questions, tmp_path / "whole", steps=4, save_every=4, eval_every=4))
    assert same_tensors(resumed(stopped).adapter, whole.adapter)
    assert losses(Run(stopped)) == losses(whole)


def test_second_press_ends_the_run_at_once(small_model: Path, questions: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt) as interrupt:
        run(settings(small_model, questions, tmp_path / "out", save_every=2), Pressing(1, times=2))
    assert not interrupt.value.args
    assert not (tmp_path / "out").exists()


def test_signal_handler_is_restored(stopped: Path) -> None:
    assert stopped.is_dir()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_samples_before_training_are_kept(stopped: Path) -> None:
    before = (stopped / "samples.json").read_text()
    assert '"after"' not in before
    assert resumed(stopped).path == stopped
    after = (stopped / "samples.json").read_text()
    assert '"after"' in after
    assert before.split('"before"')[1].split("\n")[0] in after


def test_run_can_be_made_longer(finished_run: Path, tmp_path: Path) -> None:
    longer = Path(shutil.copytree(finished_run, tmp_path / "longer"))
    finished = resumed(longer, steps=32)
    assert finished.facts()["steps"] == 32
    assert [row.step for row in finished.evaluations()] == [0, 10, 20, 30, 32]
    assert not same_tensors(finished.adapter, finished_run / "adapter")


def test_rows_outside_a_preset_stay_untrained_after_resuming(
    small_model: Path, questions: Path, tmp_path: Path
) -> None:
    changes = {"targets": ["attention"], "weight_decay": 0.1, "meta_tokens": "frozen", "save_every": 2}
    out = tmp_path / "out"
    run(settings(small_model, questions, out, **changes))
    finished = resumed(out, steps=4)
    folder = merge_run(finished.path, tmp_path / "merged")
    merged, base = tensors(folder), tensors(small_model)
    names = [name for name in base if name.endswith("in_proj.weight")]
    assert len(names) == 3
    for name in names:
        side = base[name].shape[0] - 2 * 64  # queries, keys, values; behind them the SSM's input and gate
        assert torch.equal(merged[name][side:], base[name][side:])
        assert not torch.equal(merged[name][:side], base[name][:side])


def test_fixed_settings_cannot_change(finished_run: Path, tmp_path: Path) -> None:
    flags = SFTConfig(resume=finished_run, rank=8, lr=1.0, out=tmp_path, steps=40)
    with pytest.raises(
        ConfigError, match=r"with its own settings; --lr, --out, --rank cannot change\.\n  expected   at most: --acc"
    ):
        resume_config(flags)


def test_settings_repeated_unchanged_are_allowed(finished_run: Path) -> None:
    config = resume_config(SFTConfig(resume=finished_run, rank=4, log_every=7))
    assert (config.rank, config.log_every, config.steps) == (4, 7, 30)


def test_folder_that_is_not_a_run_cannot_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is not a run: it has no config\.yaml"):
        resumed(tmp_path)


def test_run_without_a_complete_checkpoint_cannot_be_resumed(finished_run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(finished_run, tmp_path / "copy"))
    for mark in copy.rglob(WHOLE):
        mark.unlink()
    with pytest.raises(CheckpointError, match=r"copy has no complete checkpoint to resume from\.(.|\n)*--out <new>"):
        resumed(copy)
    assert (copy / "adapter").is_dir()


def test_finished_run_notes_that_no_steps_are_left(finished_run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(finished_run, tmp_path / "copy"))
    screen = Noting()
    run(resume_config(SFTConfig(resume=copy)), screen)
    assert screen.notes == ["all 30 steps are done; to train longer, increase --steps or --epochs"]


def test_run_with_changed_data_cannot_be_resumed(small_model: Path, tmp_path: Path) -> None:
    data = save_questions(tmp_path / "data.jsonl")
    out = run(settings(small_model, data, tmp_path / "out")).path
    save_questions(data, count=25)
    with pytest.raises(DataError, match=r"The data of .*out has changed since the run was started\.(.|\n)*--model RUN"):
        resumed(out, steps=3)


def test_intervals_can_change_on_resuming(small_model: Path, questions: Path, tmp_path: Path) -> None:
    stopped = run(settings(small_model, questions, tmp_path / "run", steps=3, log_every=3, eval_every=3))
    finished = resumed(stopped.path, steps=6, log_every=1, eval_every=2)
    rows = [row for row in finished.rows() if row.step > 3]
    assert [row.step for row in rows if row.loss is not None] == [4, 5, 6]
    assert [row.step for row in rows if row.eval_loss is not None] == [4, 6]


def test_what_crashes_and_people_leave_is_survived(finished_run: Path, tmp_path: Path) -> None:
    left = Path(shutil.copytree(finished_run, tmp_path / "left"))
    backup = Path(shutil.copytree(left / "checkpoints/checkpoint-30", left / "checkpoints/checkpoint-1.bak"))
    files = {path.name for path in backup.iterdir()}
    for name in ("run.json", "samples.json"):
        (left / name).write_text((left / name).read_text()[:40])
    with (left / "metrics.jsonl").open("ab") as file:
        file.write(b"\0" * 300 + b'\n{"step": 30, "lo')
    screen = Noting()
    finished = run(resume_config(SFTConfig(resume=left, steps=33, save_every=1)), screen, report=True)
    assert finished.facts()["steps"] == 33
    assert any("run.json has no record of the data" in note for note in screen.notes)
    assert [row.step for row in finished.evaluations()] == [0, 10, 20, 30, 33]
    assert {path.name for path in (left / "checkpoints").iterdir()} == {
        "checkpoint-1.bak",
        "checkpoint-32",
        "checkpoint-33",
    }
    assert {path.name for path in backup.iterdir()} == files
    assert (left / "samples.json").read_text().count('"after"') == 3


@pytest.mark.parametrize(("name", "value"), [("rank", 8), ("lr", 0.5), ("targets", ["mlp"]), ("batch_size", 3)])
def test_edited_settings_are_named(name: str, value: Any, finished_run: Path, tmp_path: Path) -> None:
    left = tmp_path / "left"
    shutil.copytree(finished_run, left, ignore=shutil.ignore_patterns("checkpoints", "adapter"))
    settings_of = yaml.safe_load((left / "config.yaml").read_text())
    (left / "config.yaml").write_text(yaml.safe_dump(settings_of | {name: value}))
    flag = f"--{name.replace('_', '-')}"
    with pytest.raises(ConfigError, match=rf"config\.yaml was edited: {flag} cannot change(.|\n)*{name}: "):
        resume_config(SFTConfig(resume=left))


def test_settings_may_name_moved_files(finished_run: Path, questions: Path, small_model: Path, tmp_path: Path) -> None:
    left = Path(shutil.copytree(finished_run, tmp_path / "left"))
    settings_of = yaml.safe_load((left / "config.yaml").read_text())
    shutil.copy(questions, tmp_path / "moved.jsonl")
    moved = {"data": [str(tmp_path / "moved.jsonl")], "model": str(shutil.copytree(small_model, tmp_path / "moved"))}
    (left / "config.yaml").write_text(yaml.safe_dump(settings_of | moved))
    assert resume_config(SFTConfig(resume=left)).data == moved["data"]


@pytest.mark.parametrize(
    ("settings_of", "message"),
    [("verb: sft\nrank: 0\n", r"cannot be used: rank: Input should"), ("verb: nothing\n", "verb is 'nothing'")],
)
def test_settings_that_cannot_be_used_are_one_line(settings_of: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(settings_of)
    with pytest.raises(CheckpointError, match=message) as error:
        resume_config(SFTConfig(resume=tmp_path))
    assert len(str(error.value).splitlines()) == 2

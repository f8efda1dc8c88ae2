from __future__ import annotations

import json
from pathlib import Path

import pytest

from hymba_tune.config import SFTConfig
from hymba_tune.errors import CheckpointError, ConfigError
from hymba_tune.files import seal
from hymba_tune.train.run import Run
from hymba_tune.train.screen import MetricsRow


def checkpoint(run: Run, step: int, *, whole: bool = True) -> Path:
    folder = run.checkpoints / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    if whole:
        (folder / "file").touch()
        seal(folder)
    return folder


def test_run_without_out_is_called_by_model_and_data() -> None:
    run = Run.choose(SFTConfig(model="me/My Hymba", data=["some/my data.jsonl"]))
    assert run.path.parent == Path("runs")
    assert run.name.startswith("my-hymba-my-data-")


def test_new_or_empty_folder_is_taken(tmp_path: Path) -> None:
    for out in (tmp_path, tmp_path / "new/er"):
        assert Run.choose(SFTConfig(out=out)).path == out


def test_file_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(ConfigError, match=r"--out .*out is a file\.\n  expected   a new or empty directory"):
        Run.choose(SFTConfig(out=tmp_path / "out"))


def test_folder_in_use_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"is not empty\.\n.*\n  to fix     another --out, or --overwrite"):
        Run.choose(SFTConfig(out=tmp_path))


def test_run_that_stands_can_be_gone_on_with(tmp_path: Path) -> None:
    Run(tmp_path).create(SFTConfig())
    with pytest.raises(ConfigError, match=r"is not empty\.\n.*\n  to fix     --resume .* to continue it, or another"):
        Run.choose(SFTConfig(out=tmp_path))


def test_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--out .*run cannot be written: Not a directory\.\n  to fix     another"):
        Run(tmp_path / "file/run").create(SFTConfig())


def test_settings_come_back(tmp_path: Path) -> None:
    config = SFTConfig(data=["a.jsonl"], map={"prompt": "question"}, lr=3e-4, targets=["mlp"], method="lora", warmup=0)
    Run(tmp_path).create(config)
    assert Run(tmp_path).read_config() == config


def test_settings_say_which_verb_they_are_of(tmp_path: Path) -> None:
    Run(tmp_path).create(SFTConfig())
    path = tmp_path / "config.yaml"
    assert path.read_text().startswith("verb: sft\n")
    path.write_text(path.read_text().removeprefix("verb: sft\n"))  # as older runs did not
    assert Run(tmp_path).read_config() == SFTConfig()


def test_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is not a run: it has no config\.yaml\.\n  expected   runs/<name>"):
        Run(tmp_path).read_config()


def test_run_of_a_version_with_other_settings_is_refused_with_their_names(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("verb: kto\ngood_weight: 2.0\nbeta: 0.1\n")
    with pytest.raises(CheckpointError, match="that this version does not have: good_weight"):
        Run(tmp_path).read_config()


@pytest.mark.parametrize("text", ["rank: [", "rank: 0", "- 1", "verb: no_such"])
def test_settings_that_cannot_be_read(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.yaml cannot be (read|used): "):
        Run(tmp_path).read_config()


def test_last_checkpoint_is_the_newest_whole_one(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for step in (9, 10):
        checkpoint(run, step)
    checkpoint(run, 11, whole=False)
    assert run.last_checkpoint() == run.checkpoints / "checkpoint-10"


def test_no_whole_checkpoint(tmp_path: Path) -> None:
    checkpoint(Run(tmp_path), 3, whole=False)
    with pytest.raises(CheckpointError, match=r"has no complete checkpoint to resume from\.\n  to fix     start again"):
        Run(tmp_path).last_checkpoint()


def test_facts_are_added_to(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert run.facts() == {}
    run.record(model="hymba-nano", steps=1)
    run.record(steps=2)
    facts = json.loads((tmp_path / "run.json").read_text())
    assert (facts["model"], facts["steps"]) == ("hymba-nano", 2)
    assert {"torch", "transformers", "hymba-tune"} <= facts["versions"].keys()
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_metrics_come_back_without_what_a_step_does_not_have(tmp_path: Path) -> None:
    run, rows = (
        Run(tmp_path),
        [MetricsRow(step=0, eval_loss=2.5), MetricsRow(step=3, loss=2.0, learning_rate=1e-3), MetricsRow(step=4)],
    )
    rows.append(MetricsRow(step=5, more={"kl": 0.5, "eval_kl": 0.25}))
    assert run.rows() == []
    for row in rows:
        run.log(row)
    assert run.rows() == rows
    assert list(run.evaluations()) == rows[:1]
    assert (tmp_path / "metrics.jsonl").read_text().splitlines()[0] == '{"step": 0, "eval_loss": 2.5}'


def test_metrics_past_a_step_are_forgotten(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for step in (1, 2, 3):
        run.log(MetricsRow(step=step))
    run.forget_after(2)
    assert [row.step for row in run.rows()] == [1, 2]
    run.forget_after(0)
    assert run.rows() == []

"""A run's folder: one process at a time works in it, and a failed or dry run leaves it unchanged."""

from __future__ import annotations

import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest

from hymba_tune.config import SFTConfig
from hymba_tune.errors import ConfigError, HymbaTuneError
from hymba_tune.files import LOCK, RUN, make_folders
from hymba_tune.registry import ModelSource
from hymba_tune.train import sft
from hymba_tune.train.claim import claimed
from hymba_tune.train.resuming import resume_config
from hymba_tune.train.run import Run
from tests.cli.conftest import Command, command  # noqa: F401 (a fixture)
from tests.files.inputs import hold
from tests.runs import run, settings


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refuse(*_: Any, **__: Any) -> None:
    raise HymbaTuneError("the data cannot be read")


def test_second_run_is_refused_before_it_reads_data(
    small_model: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, read, readers = settings(small_model, questions, tmp_path / "out"), sft.read_training_data, []

    def second_starts(*args: Any, **kwargs: Any) -> Any:
        readers.append(1)
        for dry_run in (False, True):
            with pytest.raises(ConfigError, match=r"--out .*out is in use by another process"):
                run(config.model_copy(update={"dry_run": dry_run}))
        return read(*args, **kwargs)

    monkeypatch.setattr(sft, "read_training_data", second_starts)
    done = run(config)
    assert len(readers) == 1
    assert [row.step for row in done.rows() if row.loss] == [1, 2]
    assert not (done.path / LOCK).exists()


def test_run_of_another_process_is_neither_replaced_nor_resumed(
    command: Command,  # noqa: F811
    finished_run: Path,
    questions: Path,
    tmp_path: Path,
) -> None:
    out = shutil.copytree(finished_run, tmp_path / "run")
    process = hold(out / LOCK)
    before = contents(out)
    words = ["sft", "--model", "hymba-nano", "--data", questions, "--steps", 1, "--out", out, "--overwrite"]
    for attempt in (words, [*words, "--dry-run"], ["sft", "--resume", out, "--steps", 40]):
        refused = command(*attempt)
        assert refused.code == 2
        assert f"{out} is in use by another process of hymba-tune." in refused.err
    process.kill()
    process.communicate()
    assert contents(out) == before
    assert command("sft", "--resume", out, "--steps", 31).code == 0  # a dead process keeps no lock


@pytest.mark.parametrize("how", ["dry", "failing"])
@pytest.mark.parametrize("there", ["nothing", "empty", "run"])
def test_folder_is_left_as_it_was(
    how: str,
    there: str,
    small_model: Path,
    questions: Path,
    finished_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "deep/out"
    if there == "empty":
        out.mkdir(parents=True)
    if there == "run":
        shutil.copytree(finished_run, out)
    before, folders = contents(tmp_path), sorted(tmp_path.rglob("*"))
    config = settings(small_model, questions, out, overwrite=there == "run", dry_run=how == "dry")
    if how == "dry":
        run(config)
    else:
        monkeypatch.setattr(sft.HymbaTrainer, "train", refuse)
        with pytest.raises(HymbaTuneError, match="the data cannot be read"):
            run(config)
    assert contents(tmp_path) == before
    assert sorted(tmp_path.rglob("*")) == folders


def test_run_in_the_current_folder_is_replaced_once_the_new_one_has_begun(
    small_model: Path, questions: Path, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = shutil.copytree(finished_run, Path("out"))
    (out / "evaluations.json").write_text("[]")
    run(settings(small_model, questions, out, overwrite=True))
    assert [row.step for row in Run(out).rows() if row.loss] == [1, 2]
    assert not (out / "evaluations.json").exists()
    assert "overwrite" not in (out / "config.yaml").read_text()
    assert not list(out.glob("replaced.*"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(ConfigError, match="--overwrite cannot change"):
        resume_config(SFTConfig(resume=out, overwrite=True))


def test_only_a_run_is_replaced_and_never_an_input(
    small_model: Path, questions: Path, finished_run: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(finished_run, tmp_path / "out")
    shutil.copy(questions, out / "dropped.jsonl")
    Path(tmp_path / "mix.yaml").write_text("- {path: out/dropped.jsonl}\n")
    before = contents(tmp_path)
    for model, data in (
        (out, questions),
        (out / "checkpoints/checkpoint-30", questions),
        (small_model, out / "dropped.jsonl"),
        (small_model, tmp_path / "mix.yaml"),
    ):
        with pytest.raises(ConfigError, match=r"would remove .*, an input of this command"):
            run(settings(model, data, out, overwrite=True))
    with pytest.raises(ConfigError, match=r"is not a run of hymba-tune: it has no config\.yaml"):
        run(settings(small_model, questions, tmp_path, overwrite=True))
    with pytest.raises(ConfigError, match=r"out/model is a part of a run"):
        run(settings(small_model, questions, out / "model"))
    assert contents(tmp_path) == before


def test_what_others_put_into_a_failing_runs_folder_stays(
    small_model: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        (tmp_path / "out/notes.txt").write_text("mine")
        raise KeyboardInterrupt

    monkeypatch.setattr(sft.HymbaTrainer, "train", fail)
    with pytest.raises(KeyboardInterrupt):
        run(settings(small_model, questions, tmp_path / "out"))
    assert contents(tmp_path) == {"out/notes.txt": b"mine"}


def test_default_names_do_not_collide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda _: "0101-000000")
    config, source, together = SFTConfig(model="it", data=["demo"]), ModelSource("it", tmp_path), Barrier(8)

    def start(_: int) -> Path:
        run = Run.choose(config)
        together.wait(60)
        with claimed(run, config, source):
            together.wait(60)
            (run.path / "notes.txt").touch()
            return run.path

    with ThreadPoolExecutor(8) as threads:
        paths = set(threads.map(start, range(8)))
    first = "it-demo-0101-000000"
    assert {path.name for path in paths} == {first, *(f"{first}-{number}" for number in range(2, 9))}


def test_folder_of_which_only_a_dead_lock_is_left_is_empty(tmp_path: Path) -> None:
    (tmp_path / LOCK).touch()
    config = SFTConfig(out=tmp_path)
    run = Run.choose(config)
    with claimed(run, config, ModelSource("it", tmp_path / "no")):
        assert run.path == tmp_path
    assert not list(tmp_path.iterdir())


def test_every_file_of_a_run_is_known(finished_run: Path) -> None:
    assert RUN.refusal_reason(finished_run) is None


def test_folder_of_a_run_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = SFTConfig(out=tmp_path / "file/run")
    with pytest.raises(ConfigError, match=r"--out .*file/run cannot be written: Not a directory"):
        claimed(Run.choose(config), config, ModelSource("it", tmp_path)).__enter__()


def test_resumed_run_is_tidied(tmp_path: Path) -> None:
    for name in ("adapter.0123abcd.partial", "replaced.0123abcd", "checkpoints/checkpoint-3", "mine.partial"):
        make_folders(tmp_path / name)
    (tmp_path / "run.json.0123abcd.partial").touch()
    Run(tmp_path).forget_leftovers()
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["checkpoints", "mine.partial"]

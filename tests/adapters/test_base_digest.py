"""A base model that changed after training is found, wherever its adapter is used."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hymba_tune.adapters import FACT, base_digest, changed_base, describe_difference, folding_note
from hymba_tune.config import ChatConfig, ExportConfig, MergeConfig, SFTConfig
from hymba_tune.errors import CheckpointError
from hymba_tune.generate import ChatSession
from hymba_tune.hub import export, merge
from hymba_tune.registry import resolve_model
from hymba_tune.train.resuming import resume_config
from hymba_tune.train.run import Run
from hymba_tune.train.screen import Screen
from tests.hub.silent import silent
from tests.runs import run, settings

CHANGED = r"its base model, .*, has changed since it was trained on it \(other values\)"


def write(folder: Path, tensors: dict[str, Tensor], *, files: int = 1) -> list[Path]:
    """The tensors, divided among files."""
    folder.mkdir(exist_ok=True)
    names = sorted(tensors, reverse=True)
    paths = [folder / f"{number}.safetensors" for number in range(files)]
    for number, path in enumerate(paths):
        save_file({name: tensors[name] for name in names[number::files]}, path)
    return paths


TENSORS = {
    "a": torch.arange(20.0).reshape(5, 4),
    "b": torch.arange(7).to(torch.bfloat16),
    "scalar": torch.tensor(3.0),
    "packed": torch.arange(9, dtype=torch.uint8).reshape(9, 1),
    "empty": torch.zeros(0, 3),
}


def test_digest_is_that_of_the_tensors_however_they_are_divided(tmp_path: Path) -> None:
    one, other = (base_digest(write(tmp_path / str(n), TENSORS, files=n), whole=True) for n in (1, 3))
    assert one == other
    assert (one["tensors"], one["bytes"]) == (5, 80 + 14 + 4 + 9)
    assert base_digest(write(tmp_path / "1", TENSORS)) == {name: one[name] for name in ("tensors", "bytes", "sampled")}


@pytest.mark.parametrize(
    ("name", "change", "difference"),
    [
        ("a", lambda tensor: tensor * 0.5, "other values"),
        ("b", lambda tensor: tensor + 1, "other values"),
        ("scalar", lambda tensor: tensor + 1, "other values"),
        ("a", lambda tensor: tensor.reshape(4, 5), "other values"),
        ("a", lambda tensor: tensor.to(torch.float16), "67 bytes instead of 107"),
        ("new", lambda _: torch.zeros(1), "6 tensors instead of 5"),
    ],
)
def test_every_change_of_a_tensor_is_found_at_once(
    name: str, change: Callable[[Tensor | None], Tensor], difference: str, tmp_path: Path
) -> None:
    before = base_digest(write(tmp_path, TENSORS))
    after = base_digest(write(tmp_path, {**TENSORS, name: change(TENSORS.get(name))}))
    assert describe_difference(before, after) == difference
    assert describe_difference(before, before) is None


def test_single_value_is_found_in_the_whole(tmp_path: Path) -> None:
    before = base_digest(write(tmp_path, TENSORS), whole=True)
    tensor = TENSORS["a"].clone()
    tensor[1, 2] += 1  # in none of the sampled rows
    files = write(tmp_path, {**TENSORS, "a": tensor})
    assert describe_difference(before, base_digest(files)) is None
    assert describe_difference(before, base_digest(files, whole=True)) == "other values"


def test_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_text("no tensors")
    with pytest.raises(CheckpointError, match=r"x\.safetensors: the weights cannot be read"):
        base_digest([tmp_path / "x.safetensors"])


def perturb(folder: Path) -> None:
    """As the folder of a base changes when somebody trains or edits it."""
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "in_proj" in name)
    tensors[name] *= 0.5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def trained(small_model: Path, questions: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run, and its base, which was changed after training."""
    folder = tmp_path_factory.mktemp("base")
    base = Path(shutil.copytree(small_model, folder / "base"))
    path = run(settings(base, questions, folder / "run", eval_split=0)).path
    assert folding_note(resolve_model(str(path)), whole=True) is None
    perturb(base)
    return path, base


def test_changed_base_is_noted_by_chat_merge_and_export(trained: tuple[Path, Path], tmp_path: Path) -> None:
    path, _ = trained
    notes: list[str] = []
    ChatSession(ChatConfig(model=str(path), dtype="float32"), notes.append)
    notes.append(merge(MergeConfig(model=str(path), out=tmp_path / "merged"), silent).change or "")
    notes.append(export(ExportConfig(model=str(path), out=tmp_path / "exported", license="mit"), silent).note or "")
    assert len(notes) == 3
    for note in notes:
        assert re.search(CHANGED, note)
        assert str(trained[1]) in note


def test_changed_base_is_noted_on_resuming_and_stays_recorded(trained: tuple[Path, Path], tmp_path: Path) -> None:
    path = Path(shutil.copytree(trained[0], tmp_path / "resumed"))
    notes: list[str] = []

    class Noting(Screen):
        def note(self, text: str) -> None:
            notes.append(text)

    before = Run(path).facts()[FACT]
    run(resume_config(SFTConfig(resume=path, steps=3)), Noting())
    assert any("has changed since the run was started (other values)" in note for note in notes)
    assert Run(path).facts()[FACT]["sampled"] == before["sampled"]
    assert "(other values)" in str(folding_note(resolve_model(str(path))))


def test_run_without_a_digest_is_used_without_a_warning(trained: tuple[Path, Path], tmp_path: Path) -> None:
    path = Path(shutil.copytree(trained[0], tmp_path / "old"))
    facts = json.loads((path / "run.json").read_text())
    del facts[FACT]
    (path / "run.json").write_text(json.dumps(facts))
    assert folding_note(resolve_model(str(path)), whole=True) is None
    notes: list[str] = []

    class Noting(Screen):
        def note(self, text: str) -> None:
            notes.append(text)

    run(resume_config(SFTConfig(resume=path, steps=3)), Noting())
    assert not any("changed" in note for note in notes)


def test_base_whose_weights_are_not_downloaded_yet_is_unknown(trained: tuple[Path, Path], tmp_path: Path) -> None:
    source = resolve_model(str(trained[0]))
    (tmp_path / "config.json").write_text("{}")
    elsewhere = replace(resolve_model(str(tmp_path)), hub_id="a/b")
    assert changed_base(source, elsewhere, [tmp_path]) is None

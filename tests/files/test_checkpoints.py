from __future__ import annotations

import json
from pathlib import Path

import pytest

from hymba_tune.errors import CheckpointError
from hymba_tune.files import WHOLE, is_whole, seal
from hymba_tune.files.checkpoints import check_run, forget_oldest, forget_torn, newest_whole, step_of

FILES = {"adapter.safetensors": b"weights" * 40, "trainer_state.json": b"{}", "global_step/shard.pt": b"moments"}


def checkpoint(folder: Path, step: int) -> Path:
    path = folder / f"checkpoint-{step}"
    for name, content in FILES.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def test_checkpoint_is_complete_only_once_sealed(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, 1)
    assert not is_whole(path)
    seal(path)
    assert is_whole(path)
    assert json.loads((path / WHOLE).read_text()).keys() == FILES.keys()
    seal(path)
    assert is_whole(path)


@pytest.mark.parametrize("name", [*FILES, WHOLE])
@pytest.mark.parametrize("damage", ["missing", "empty", "shortened", "longer", "altered"])
def test_any_damage_to_any_file_is_detected(name: str, damage: str, tmp_path: Path) -> None:
    path = checkpoint(tmp_path, 2)
    seal(path)
    seal(checkpoint(tmp_path, 1))
    content = (path / name).read_bytes()
    if damage == "missing":
        (path / name).unlink()
    else:
        altered = content[:-1] + b"\x00"
        # The mark's last byte is a newline: without it, it would have the same content.
        damages = {"empty": b"", "shortened": content[:-2], "longer": content + b"}", "altered": altered}
        (path / name).write_bytes(damages[damage])
    assert not is_whole(path)
    assert newest_whole(tmp_path) == tmp_path / "checkpoint-1"


def test_newest_checkpoint_has_the_largest_step(tmp_path: Path) -> None:
    assert newest_whole(tmp_path) is None
    for step in (10, 9, 100):
        seal(checkpoint(tmp_path, step))
    assert newest_whole(tmp_path) == tmp_path / "checkpoint-100"


def test_only_incomplete_checkpoints_are_removed(tmp_path: Path) -> None:
    seal(checkpoint(tmp_path, 1))
    checkpoint(tmp_path, 2)
    forget_torn(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_seal_without_files_is_invalid(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, 1)
    for content in ("{}", "[1]", "null", '{"a": 1}'):
        (path / WHOLE).write_text(content)
        assert not is_whole(path)


def test_copies_that_people_leave_are_neither_checkpoints_nor_removed(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        seal(checkpoint(tmp_path, step))
    left = ["checkpoint-9.bak", "checkpoint-9 (copy)", "checkpoint-", "checkpoint-x", "checkpoint-4-old", "notes"]
    for name in left:
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-8").write_text("a file")
    assert newest_whole(tmp_path) == tmp_path / "checkpoint-3"
    forget_torn(tmp_path)
    forget_oldest(tmp_path, keep=1, best=None)
    assert {path.name for path in tmp_path.iterdir()} == {*left, "checkpoint-8", "checkpoint-3"}


@pytest.mark.parametrize(
    ("keep", "best", "kept"),
    [(2, None, {3, 4}), (2, 1, {1, 4}), (2, 4, {3, 4}), (3, 1, {1, 3, 4}), (1, 1, {1, 4}), (9, 1, {1, 2, 3, 4})],
)
def test_newest_and_best_checkpoints_are_kept(keep: int, best: int | None, kept: set[int], tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        seal(checkpoint(tmp_path, step))
    forget_oldest(tmp_path, keep=keep, best=best and str(tmp_path / f"checkpoint-{best}"))
    assert {step_of(path) for path in tmp_path.iterdir()} == kept


def test_misspelled_run_is_named_with_the_nearest_one(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "config.yaml").touch()
    (tmp_path / "frost").mkdir()
    check_run(tmp_path / "first")
    with pytest.raises(
        CheckpointError, match=r"frist is not a run: it has no config\.yaml(.|\n)*did you mean .*first\?"
    ):
        check_run(tmp_path / "frist")

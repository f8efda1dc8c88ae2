from __future__ import annotations

import json
from pathlib import Path

import pytest

from hymba_tune.train.checkpoints import WHOLE, forget_torn, is_whole, newest_whole, seal

FILES = {"adapter.safetensors": b"weights" * 40, "trainer_state.json": b"{}", "global_step/shard.pt": b"moments"}


def checkpoint(folder: Path, step: int) -> Path:
    path = folder / f"checkpoint-{step}"
    for name, content in FILES.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def test_sealed_checkpoint_is_whole_until_then_it_is_not(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, 1)
    assert not is_whole(path)
    seal(path)
    assert is_whole(path)
    assert json.loads((path / WHOLE).read_text()).keys() == FILES.keys()
    seal(path)
    assert is_whole(path)


@pytest.mark.parametrize("name", [*FILES, WHOLE])
@pytest.mark.parametrize("harm", ["missing", "empty", "shortened", "longer", "altered"])
def test_any_harm_to_any_file_is_seen(name: str, harm: str, tmp_path: Path) -> None:
    path = checkpoint(tmp_path, 2)
    seal(path)
    seal(checkpoint(tmp_path, 1))
    content = (path / name).read_bytes()
    if harm == "missing":
        (path / name).unlink()
    else:
        altered = content[:-1] + b"\x00"
        # The mark's last byte is a newline: without it, it would say the same.
        harms = {"empty": b"", "shortened": content[:-2], "longer": content + b"}", "altered": altered}
        (path / name).write_bytes(harms[harm])
    assert not is_whole(path)
    assert newest_whole(tmp_path) == tmp_path / "checkpoint-1"


def test_newest_goes_by_number(tmp_path: Path) -> None:
    assert newest_whole(tmp_path) is None
    for step in (10, 9, 100):
        seal(checkpoint(tmp_path, step))
    assert newest_whole(tmp_path) == tmp_path / "checkpoint-100"


def test_only_torn_checkpoints_are_forgotten(tmp_path: Path) -> None:
    seal(checkpoint(tmp_path, 1))
    checkpoint(tmp_path, 2)
    forget_torn(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_mark_that_lists_nothing_is_no_mark(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, 1)
    for content in ("{}", "[1]", "null", '{"a": 1}'):
        (path / WHOLE).write_text(content)
        assert not is_whole(path)

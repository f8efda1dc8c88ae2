"""Files that several processes make together: each is made once, and what a dead process leaves is made by another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hymba_tune.distributed import shared_files
from hymba_tune.distributed.shared_files import make_once, make_together
from tests.files.inputs import hold


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_files, "POLL", 0.01)


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    return [tmp_path / str(number) for number in range(5)]


def making(paths: list[Path], made: list[int]) -> Callable[[int], None]:
    def make(number: int) -> None:
        made.append(number)
        paths[number].touch()

    return make


def nobody() -> None:
    raise AssertionError("there is nobody to wait for")


def test_a_process_makes_its_share_first(paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    made: list[int] = []
    paths[2].touch()
    make_together(paths, lambda number: paths[number].is_file(), making(paths, made), nobody)
    assert made == [1, 3, 0, 4]
    assert sorted(paths[0].parent.iterdir()) == paths


def test_what_another_process_makes_is_waited_for_and_taken_over_if_that_dies(paths: list[Path]) -> None:
    made: list[int] = []
    other = hold(paths[1].with_name("1.lock"))
    waited: list[list[int]] = []

    def waiting() -> None:
        waited.append(list(made))
        if len(waited) == 2:
            other.kill()
            other.communicate()

    make_together(paths, lambda number: paths[number].is_file(), making(paths, made), waiting)
    assert waited[:2] == [[0, 2, 3, 4]] * 2
    assert made == [0, 2, 3, 4, 1]


def test_file_that_another_machine_has_put_in_its_place_is_complete(paths: list[Path]) -> None:
    def make(number: int) -> None:
        paths[number].touch()
        paths[number].with_name("gone").rename(paths[number])

    make_together(paths, lambda number: paths[number].is_file(), make, nobody)
    with pytest.raises(FileNotFoundError, match="gone"):
        make_together(paths, lambda _: False, make, nobody)


def test_file_is_made_once(tmp_path: Path) -> None:
    path, made = tmp_path / "it", []
    for number in range(2):
        make_once(path, lambda number=number: (made.append(number), path.touch()))  # type: ignore[misc]
    assert made == [0]
    assert [other.name for other in tmp_path.iterdir()] == ["it"]

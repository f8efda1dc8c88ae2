from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hymba_tune.config import OnBadRow
from hymba_tune.data import RowError, RowLocation, Source, SourceRow
from hymba_tune.data.dividing import divide
from hymba_tune.errors import ConfigError, DataError
from tests.data.inputs import numbered, source


def parts(folder: Path) -> tuple[list[Any], list[Any]]:
    train, held_out = (
        [json.loads(line) for line in (folder / name).read_text().splitlines()]
        for name in ("train.jsonl", "eval.jsonl")
    )
    return train, held_out


def test_rows_are_unchanged_and_in_order(tmp_path: Path) -> None:
    done = divide([numbered(200)], 0.1, tmp_path / "new" / "out")
    train, held_out = parts(tmp_path / "new" / "out")
    assert (done.train, done.held_out) == (len(train), len(held_out)) == (180, 20)
    order = [row.value for row in numbered(200)]
    assert train == [row for row in order if row in train]
    assert sorted(map(str, train + held_out)) == sorted(map(str, order))


def test_same_seed_gives_the_same_division(tmp_path: Path) -> None:
    for name, seed in {"a": 1, "b": 1, "c": 2}.items():
        divide([numbered(60)], 0.3, tmp_path / name, seed=seed)
    first, again, other = (parts(tmp_path / name)[1] for name in "abc")
    assert first == again != other


def test_rows_with_the_same_prompt_stay_together(tmp_path: Path) -> None:
    rows = [{"prompt": f"Count to {n}!", "completion": str(a)} for n in range(40) for a in range(3)]
    rows += [{"instruction": f"count  to {n}", "output": "x"} for n in range(40)]
    divide([source(rows)], 0.25, tmp_path)
    train, held_out = parts(tmp_path)
    numbers = [
        {"".join(filter(str.isdigit, row.get("prompt") or row["instruction"])) for row in part}
        for part in (train, held_out)
    ]
    assert not numbers[0] & numbers[1]
    assert len(held_out) == 40


def test_rows_of_unknown_formats_are_grouped_by_their_prompt(tmp_path: Path) -> None:
    rows = [{"prompt": f"Q{n}", "chosen": f"{a}", "rejected": "x"} for n in range(20) for a in range(2)]
    divide([source([*rows, *({"anything": n} for n in range(20))])], 0.5, tmp_path)
    train, held_out = parts(tmp_path)
    prompts = [{row["prompt"] for row in part if "prompt" in row} for part in (train, held_out)]
    assert not prompts[0] & prompts[1]
    assert len(train) + len(held_out) == 60


def test_half_characters_are_unchanged(tmp_path: Path) -> None:
    """Splitting does not check texts; training and `data check` do."""
    rows = [{"prompt": f"{number} \ud83d", "completion": "🙂"} for number in range(10)]
    divide([source(rows)], 0.5, tmp_path)
    train, held_out = parts(tmp_path)
    assert sorted(map(str, train + held_out)) == sorted(map(str, rows))


def test_both_sides_have_a_row(tmp_path: Path) -> None:
    for name, fraction in {"little": 0.01, "much": 0.99}.items():
        done = divide([numbered(3)], fraction, tmp_path / name)
        assert min(done.train, done.held_out) == 1


def test_mapping_names_the_column_of_prompts(tmp_path: Path) -> None:
    rows = [{"q": f"{n % 10}", "a": f"{n}"} for n in range(40)]
    divide([source(rows)], 0.5, tmp_path, mapping={"prompt": "q", "completion": "a"})
    train, held_out = parts(tmp_path)
    assert not {row["q"] for row in train} & {row["q"] for row in held_out}


def test_unreadable_row_stops_or_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hymba_tune.data.dividing.PROGRESS_ROWS", 2)
    bad = SourceRow(RowLocation("a.jsonl", 1), error=DataError("not JSON"))
    rows = Source("a.jsonl", lambda: iter([bad, *numbered(9)]))
    for out in (tmp_path, tmp_path / "new"):
        with pytest.raises(RowError, match=r"a\.jsonl, line 1: not JSON"):
            divide([rows], 0.3, out)
    assert list(tmp_path.iterdir()) == []
    seen: list[int] = []
    done = divide([rows], 0.3, tmp_path, on_bad_row=OnBadRow.skip, progress=seen.append)
    assert (done.train, done.held_out, done.unreadable) == (6, 3, 1)
    assert seen == [2, 4, 6, 8, 10]


def test_data_with_a_single_prompt_cannot_be_divided(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Cannot divide support\.jsonl: all rows have the same prompt"):
        divide([source([{"prompt": "a", "completion": str(n)} for n in range(5)])], 0.5, tmp_path)


def test_existing_files_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "eval.jsonl").touch()
    with pytest.raises(ConfigError, match=r"--out .*eval\.jsonl exists\.\n.*--overwrite"):
        divide([numbered(5)], 0.5, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["eval.jsonl"]
    divide([numbered(5)], 0.5, tmp_path, overwrite=True)
    assert parts(tmp_path)[1]


def test_folder_that_cannot_be_created_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--out .*file/out cannot be written: Not a directory"):
        divide([numbered(5)], 0.5, tmp_path / "file" / "out")

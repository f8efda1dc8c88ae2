from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import hypothesis
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from hymba_tune.config import Learn, OnBadRow
from hymba_tune.data import (
    DataReport,
    PreferenceReport,
    build_dataset,
    build_preferences,
    cache_folder,
    open_sources,
    with_chat_template,
)
from hymba_tune.data import cache as data_cache
from hymba_tune.data.cache import clear, store
from hymba_tune.errors import DataError
from tests.data.inputs import numbered
from tests.preferences import save_pairs

ROWS = [{"prompt": f"Count to {number}.", "completion": str(number)} for number in range(5)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of texts of each call of the tokenizer."""
    calls: list[int] = []
    from hymba_tune.data import encoding

    tokenize = encoding.tokenize

    def counting(rendered: list[object], tokenizer: object) -> object:
        calls.append(len(rendered))
        return tokenize(rendered, tokenizer)  # type: ignore[arg-type]

    monkeypatch.setattr(encoding, "tokenize", counting)
    return calls


def test_same_data_is_encoded_once(file: Path, cache: Path, hymba: PreTrainedTokenizerFast, encoded: list[int]) -> None:
    first, report = build_dataset(open_sources([str(file)]), hymba, max_length=64, cache_dir=cache)
    os.utime(file, (1, 1))  # only the content counts, not the time
    second, again = build_dataset(open_sources([str(file)]), hymba, max_length=64, cache_dir=cache)
    assert encoded == [5]
    assert first.to_list() == second.to_list()
    assert again == report
    assert len(list(cache.iterdir())) == 1


def test_everything_that_affects_the_rows_affects_the_key(
    file: Path, cache: Path, hymba: PreTrainedTokenizerFast, encoded: list[int]
) -> None:
    def build(tokenizer: PreTrainedTokenizerFast = hymba, weight: float = 1.0, cap: int = 9, **changes: object) -> None:
        settings: dict[str, object] = {"max_length": 64, **changes}
        build_dataset(open_sources([str(file)], [weight], [cap]), tokenizer, cache_dir=cache, **settings)  # type: ignore[arg-type]

    build()
    for changes in (
        {"tokenizer": with_chat_template(hymba, "alpaca")},
        {"max_length": 65},
        {"weight": 0.9},
        {"weight": 2},
        {"cap": 3},
        {"learn": Learn.last},
        {"mapping": {"role.bot": "assistant"}},
        {"seed": 1},
        {"on_bad_row": OnBadRow.skip},
    ):
        before = len(encoded)
        build(**changes)  # type: ignore[arg-type]
        assert len(encoded) == before + 1, changes
    file.write_text(file.read_text().replace("Count", "count"))
    build()
    assert len(encoded) == 11


@pytest.mark.parametrize("paired", [True, False])
def test_preferences_are_encoded_once(
    paired: bool, cache: Path, hymba: PreTrainedTokenizerFast, encoded: list[int], tmp_path: Path
) -> None:
    path = save_pairs(tmp_path / "pairs.jsonl", 5)
    path.write_text(path.read_text() + json.dumps({"prompt": "a", "chosen": "b", "rejected": "b"}) + "\n")

    def build(**changes: object) -> tuple[Dataset, PreferenceReport]:
        settings: dict[str, object] = {"paired": paired, "max_length": 100, "on_bad_row": OnBadRow.skip, **changes}
        return build_preferences(open_sources([str(path)]), hymba, cache_dir=cache, **settings)  # type: ignore[arg-type]

    first, report = build()
    second, again = build()
    assert encoded == [10]
    assert first.to_list() == second.to_list()
    assert report.counts() == again.counts()
    assert (report.identical, len(first)) == (1, 5 if paired else 10)
    build(paired=not paired)
    build(max_length=101)
    assert len(encoded) == 3


def test_rows_without_a_digest_are_encoded_each_time(cache: Path, hymba: PreTrainedTokenizerFast) -> None:
    reports = [build_dataset([numbered(5)], hymba, max_length=64, cache_dir=cache)[1] for _ in range(2)]
    assert [entry.name for entry in cache.iterdir()] == [reports[0].fingerprint]
    assert reports[0] == reports[1]


def test_dropped_rows_are_listed_from_the_cache_under_the_name_of_the_file(
    file: Path, cache: Path, hymba: PreTrainedTokenizerFast, encoded: list[int], tmp_path: Path
) -> None:
    file.write_text(file.read_text() + '{"prompt": "x"}\n')

    def listed(path: Path) -> str:
        sources = open_sources([str(path)])
        _, report = build_dataset(sources, hymba, max_length=64, on_bad_row=OnBadRow.skip, cache_dir=cache)
        report.write_dropped(tmp_path / "dropped.jsonl")
        return str(json.loads((tmp_path / "dropped.jsonl").read_text())["file"])

    assert [listed(file), listed(file)] == [str(file)] * 2
    assert encoded == [5]
    renamed = file.rename(file.with_name("b.jsonl"))
    assert listed(renamed) == str(renamed)


@pytest.mark.parametrize("damaged", ["report.json", "rows.arrow"])
def test_damaged_entry_is_encoded_again(
    damaged: str, file: Path, cache: Path, hymba: PreTrainedTokenizerFast, encoded: list[int]
) -> None:
    first, _ = build_dataset(open_sources([str(file)]), hymba, max_length=64, cache_dir=cache)
    rows = first.to_list()
    (entry,) = cache.iterdir()
    (entry / damaged).write_bytes(b"{")
    for _ in range(2):
        second, _ = build_dataset(open_sources([str(file)]), hymba, max_length=64, cache_dir=cache)
        assert second.to_list() == rows
    assert encoded == [5, 5]


@given(place=st.floats(0, 1, exclude_max=True), byte=st.integers(1, 255))
@hypothesis.settings(max_examples=10, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
def test_any_corrupt_byte_is_found(
    place: float,
    byte: int,
    file: Path,
    hymba: PreTrainedTokenizerFast,
    encoded: list[int],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    cache = tmp_path_factory.mktemp("cache")
    first, report = build_dataset(open_sources([str(file)]), hymba, max_length=64, cache_dir=cache)
    expected = first.to_list()
    rows = next(cache.glob("*/rows.arrow"))
    content = bytearray(rows.read_bytes())
    content[int(place * len(content))] ^= byte
    rows.write_bytes(content)
    encoded.clear()
    again, reported = build_dataset(open_sources([str(file)]), hymba, max_length=64, cache_dir=cache)
    assert encoded == [len(ROWS)]
    assert again.to_list() == expected
    assert reported == report


def test_unwritable_cache_is_replaced_by_a_temporary_folder(
    file: Path, hymba: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "blocked").touch()
    dataset, _ = build_dataset(open_sources([str(file)]), hymba, max_length=64, cache_dir=tmp_path / "blocked")
    assert len(dataset) == 5


def test_full_disk_is_an_error_and_leaves_nothing(
    file: Path, cache: Path, hymba: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(DataReport, "save", full)
    with pytest.raises(DataError, match=r"the disk is full(.|\n)*hymba-tune data clear"):
        build_dataset(open_sources([str(file)]), hymba, max_length=64, cache_dir=cache)
    assert list(cache.iterdir()) == []


def test_entry_that_another_process_stored_first_is_used(tmp_path: Path) -> None:
    for name, content in {"entry": "theirs", "mine": "mine"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows").write_text(content)
    assert (store(tmp_path / "mine", tmp_path, "entry") / "rows").read_text() == "theirs"


def test_least_recently_used_entries_are_removed_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_cache, "LIMIT_BYTES", 2500)
    for age, name in enumerate(["newest", "older", "oldest", "unfinished-old"]):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows").write_bytes(b"x" * 1000)
        os.utime(tmp_path / name, (1000.0 - age, 1000.0 - age))
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "rows").write_bytes(b"x" * 1000)
    store(tmp_path / "new", tmp_path, "mine")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "newest"]
    seal = (tmp_path / "mine/whole").stat().st_size
    assert clear(tmp_path) == (2, 2000 + seal)
    assert clear(tmp_path / "no such folder") == (0, 0)


def test_cache_folder_follows_xdg_cache_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/there")
    assert cache_folder() == Path("/there/hymba-tune/data")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache/hymba-tune/data"

"""Of tables, only the columns that a row needs are read, and cells that Python cannot hold do no harm elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from hymba_tune.data import SourceRow, build_dataset, build_preferences, open_source
from hymba_tune.data.checking import check_sources
from hymba_tune.data.converting import convert
from hymba_tune.data.dividing import divide
from hymba_tune.data.formats import Names, needed_columns
from hymba_tune.data.values import UnreadValue
from hymba_tune.errors import DataError

CASES = Path(__file__).parent / "cases"
LATE = pa.array([2**62, None], pa.timestamp("us"))
UNKNOWN_ZONE = pa.array([0, 0], pa.timestamp("us", tz="Mars/Olympus"))
LATIN_1 = pa.Array.from_buffers(
    pa.string(), 2, [None, pa.array([0, 1, 2], pa.int32()).buffers()[1], pa.py_buffer(b"\xe9a")]
)
BAD = {"year past 9999": LATE, "unknown zone": UNKNOWN_ZONE, "Latin-1": LATIN_1}


def save(path: Path, **columns: object) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize("case", ["timestamp", "latin1"])
def test_bad_cells_of_other_columns_do_no_harm(case: str, hymba: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    source = open_source(str(CASES / f"{case}.parquet"))
    assert check_sources([source], hymba, max_length=64).usable
    assert len(build_dataset([source], hymba, max_length=64)[0]) == 1
    assert convert([source], "messages", tmp_path / "a.jsonl").rows == 1


@pytest.mark.parametrize("kind", BAD)
def test_bad_cell_of_a_needed_column_is_refused_by_its_row(
    kind: str, hymba: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = save(tmp_path / "a.parquet", prompt=["a", "b"], completion=BAD[kind])
    with pytest.raises(DataError, match=r'a\.parquet, row 1: "completion" is a value that cannot be read \('):
        build_dataset([open_source(str(path))], hymba, max_length=64)


@pytest.mark.parametrize("kind", BAD)
def test_bad_cell_of_an_unknown_format_keeps_the_message(
    kind: str, hymba: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = save(tmp_path / "a.parquet", question=["a", "b"], response=["c", "d"], other=BAD[kind])
    result = check_sources([open_source(str(path))], hymba, max_length=64)
    assert {problem.fix for problem in result.problems.values()} == {"--map prompt=question --map completion=response"}
    mapping = {"prompt": "question", "completion": "response"}
    assert check_sources([open_source(str(path))], hymba, max_length=64, mapping=mapping).usable


def values(rows: Iterator[SourceRow]) -> list[object]:
    return [row.value for row in rows]


def test_only_needed_columns_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "a.parquet", prompt=["a"], blob=[b"x" * 9], completion=["b"], q=["c"])
    read: list[list[str]] = []
    whole = pq.ParquetFile.iter_batches

    def iter_batches(table: pq.ParquetFile, **settings: object) -> Iterator[pa.RecordBatch]:
        batches: Iterator[pa.RecordBatch] = whole(table, **settings)
        for batch in batches:
            read.append(batch.schema.names)
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", iter_batches)
    source = open_source(str(path))
    (row,) = values(iter(source.only(partial(needed_columns, Names()))))
    assert isinstance(row, dict)
    assert list(row) == ["prompt", "blob", "completion", "q"]
    assert (row["prompt"], row["completion"]) == ("a", "b")
    assert isinstance(row["blob"], UnreadValue)
    (row,) = values(iter(source.only(partial(needed_columns, Names({"prompt": "q"})))))
    assert isinstance(row, dict)
    assert row["q"] == "c"
    assert values(iter(source)) == [{"prompt": "a", "blob": b"x" * 9, "completion": "b", "q": "c"}]
    assert read == [["prompt", "completion"], ["prompt", "completion", "q"], ["prompt", "blob", "completion", "q"]]


def test_scores_of_pairs_are_read(hymba: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = save(
        tmp_path / "a.parquet", prompt=["a"], chosen=["b"], rejected=["c"], score_chosen=[1.0], score_rejected=[1.0]
    )
    _, report = build_preferences([open_source(str(path))], hymba, paired=True, max_length=64)
    assert report.ties == 1


def test_split_writes_dates_and_refuses_what_json_lacks(tmp_path: Path) -> None:
    dates = pa.array([0, 1], pa.timestamp("us"))
    path = save(tmp_path / "a.parquet", prompt=["a", "b"], completion=["c", "d"], when=dates)
    divide([open_source(str(path))], 0.5, tmp_path / "out")
    assert '"when": "1970-01-01 00:00:00' in (tmp_path / "out" / "train.jsonl").read_text()
    for name, bad in {"bytes": pa.array([b"x", b"y"]), "late": LATE}.items():
        path = save(tmp_path / f"{name}.parquet", prompt=["a", "b"], completion=["c", "d"], bad=bad)
        with pytest.raises(DataError, match=r"parquet, row 1: it holds a (bytes|value that cannot be read)"):
            divide([open_source(str(path))], 0.5, tmp_path / name)


class TestFolders:
    """Folders that `datasets` wrote, and folders of files for training and evaluation."""

    rows = ({"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"})

    @pytest.fixture
    def dataset(self) -> datasets.Dataset:
        return datasets.Dataset.from_list(list(self.rows))

    def test_saved_dataset_is_read(
        self, dataset: datasets.Dataset, hymba: PreTrainedTokenizerFast, tmp_path: Path
    ) -> None:
        dataset.save_to_disk(tmp_path / "saved")
        source = open_source(str(tmp_path / "saved"))
        assert values(iter(source)) == list(self.rows)
        assert str(next(iter(source)).place) == f"{tmp_path / 'saved'}, row 1"
        assert source.held_out is None
        _, report = build_dataset([source], hymba, max_length=64, cache_dir=tmp_path / "cache")
        assert report.conversations == 2

    def test_saved_splits_are_training_and_evaluation_data(self, dataset: datasets.Dataset, tmp_path: Path) -> None:
        datasets.DatasetDict(train=dataset, test=dataset.select([1])).save_to_disk(tmp_path / "saved")
        source = open_source(str(tmp_path / "saved"))
        assert values(iter(source)) == list(self.rows)
        assert source.held_out is not None
        assert values(iter(source.held_out)) == list(self.rows[1:])

    def test_damaged_dataset_is_named(self, dataset: datasets.Dataset, tmp_path: Path) -> None:
        dataset.save_to_disk(tmp_path / "saved")
        (tmp_path / "saved" / "data-00000-of-00001.arrow").write_bytes(b"x")
        with pytest.raises(DataError, match=r"Cannot read .*saved: "):
            list(open_source(str(tmp_path / "saved")))

    def test_files_are_found_by_their_names(self, dataset: datasets.Dataset, tmp_path: Path) -> None:
        dataset.to_json(tmp_path / "train.jsonl")
        dataset.select([1]).to_json(tmp_path / "test.jsonl")
        dataset.select([0]).to_csv(tmp_path / "validation.csv", index=False)
        (tmp_path / "dataset_info.json").write_text("{}")
        source = open_source(str(tmp_path))
        assert (source.name, values(iter(source))) == (str(tmp_path / "train.jsonl"), list(self.rows))
        assert source.held_out is not None
        assert values(iter(source.held_out)) == list(self.rows[:1])

    def test_numbered_files_are_one_source(
        self, dataset: datasets.Dataset, hymba: PreTrainedTokenizerFast, tmp_path: Path
    ) -> None:
        (tmp_path / "data").mkdir()
        for number in range(2):
            dataset.select([number]).to_parquet(tmp_path / "data" / f"train-0000{number}-of-00002.parquet")
        source = open_source(str(tmp_path))
        assert values(iter(source)) == list(self.rows)
        data, _ = build_dataset([source], hymba, max_length=64, cache_dir=tmp_path / "cache")
        assert data[1]["place"] == f"{tmp_path}/data/train-00001-of-00002.parquet, row 1"

    @pytest.mark.parametrize(
        "names", [[], ["a.jsonl"], ["train.jsonl", "train.csv"], ["trainer.jsonl", "train_sft.csv"]]
    )
    def test_other_folders_are_refused(self, names: list[str], tmp_path: Path) -> None:
        for name in names:
            (tmp_path / name).write_text("{}")
        with pytest.raises(
            DataError, match="it is a folder, and not clear which of its files is for training"
        ) as refusal:
            open_source(str(tmp_path))
        assert refusal.value.details["to fix"] == (
            "name its files: " + ", ".join(str(tmp_path / name) for name in sorted(names)) if names else ""
        )

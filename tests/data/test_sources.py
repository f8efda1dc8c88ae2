from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets.exceptions import DatasetNotFoundError

from hymba_tune.config import SFTConfig
from hymba_tune.data import open_source, open_sources
from hymba_tune.data.training import opened
from hymba_tune.errors import DataError, HubError


def test_source_can_be_read_again(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n{"text": "y"}\n')
    (source,) = open_sources([str(path)])
    assert list(source) == list(source)
    assert next(iter(source)).value == {"text": "x"}


def test_demo_comes_with_its_evaluation_data() -> None:
    demo = open_source("demo")
    assert demo.held_out is not None
    train, held_out = ([row.value for row in source] for source in (demo, demo.held_out))
    assert all(isinstance(row, dict) and row.keys() == {"messages"} for row in train + held_out)
    assert not [row for row in held_out if row in train]


def test_missing_file_suggests_near_names(tmp_path: Path) -> None:
    (tmp_path / "support.jsonl").touch()
    with pytest.raises(DataError, match=r"Cannot find .*suport\.jsonl\.") as refusal:
        open_source(str(tmp_path / "suport.jsonl"))
    assert f"did you mean {tmp_path / 'support.jsonl'}?" in str(refusal.value)


@pytest.mark.parametrize("name", ["suport", "support.jsnl", "./support", "there/support.jsonl", "here/support"])
def test_name_that_looks_like_a_file_is_not_looked_up_on_the_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=f"Cannot find {name}"):
        open_source(name)


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no folder .*/there either"):
        open_source(str(tmp_path / "there" / "a.jsonl"))


def test_folder_names_its_files(tmp_path: Path) -> None:
    (tmp_path / "a.csv").touch()
    (tmp_path / "notes.md").touch()
    with pytest.raises(DataError, match="it is a folder") as refusal:
        open_source(str(tmp_path))
    assert f"name its files: {tmp_path / 'a.csv'}" in str(refusal.value)
    assert "notes.md" not in str(refusal.value)


@pytest.mark.parametrize("name", ["a.docx", "a", "a.txt.gz", "a.jsonl.zst"])
def test_unknown_ending_lists_the_known_ones(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(DataError, match=r"its ending is unknown(.|\n)*\.jsonl, .*\.parquet"):
        open_source(str(tmp_path / name))


class TestHub:
    """The Hub behind `datasets.load_dataset`, which tests do not reach."""

    @pytest.fixture
    def loaded(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
        calls: list[tuple[Any, ...]] = []

        def load_dataset(path: str, config: str | None, *, split: str) -> datasets.Dataset:
            calls.append((path, config, split))
            return datasets.Dataset.from_list([{"text": "x"}, {"text": "y"}])

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return calls

    @pytest.mark.parametrize(
        ("name", "call"),
        [
            ("openai/gsm8k", ("openai/gsm8k", None, "train")),
            ("openai/gsm8k:main", ("openai/gsm8k", "main", "train")),
            ("openai/gsm8k@test", ("openai/gsm8k", None, "test")),
            ("openai/gsm8k:main@train[:100]", ("openai/gsm8k", "main", "train[:100]")),
        ],
    )
    def test_name_holds_configuration_and_split(
        self, name: str, call: tuple[Any, ...], loaded: list[tuple[Any, ...]]
    ) -> None:
        rows = list(open_source(name))
        assert loaded == [call]
        assert [row.value for row in rows] == [{"text": "x"}, {"text": "y"}]
        assert str(rows[1].place) == f"{name}, row 2"

    @pytest.mark.parametrize(
        ("raised", "kind", "message"),
        [
            (
                ConnectionError("Couldn't reach it"),
                HubError,
                "the Hugging Face Hub cannot be reached(.|\n)*--data FILE",
            ),
            (
                DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub"),
                HubError,
                "doesn't exist(.|\n)*hf auth login",
            ),
            (ValueError("Config name is missing"), DataError, "Config name is missing(.|\n)*a/b:CONFIG@SPLIT"),
            (RuntimeError("Dataset scripts are no longer supported"), DataError, "scripts are no longer supported"),
        ],
    )
    def test_failure_is_one_message(
        self, raised: Exception, kind: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def load_dataset(*_: object, **__: object) -> None:
            raise raised

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        with pytest.raises(kind, match=message):
            list(open_source("a/b"))

    def test_unreachable_hub_is_one_message(self) -> None:
        with pytest.raises(HubError, match="the Hugging Face Hub cannot be reached"):  # tests run offline
            list(open_source("no-such-owner/no-such-dataset"))

    def test_dataset_is_downloaded_once_when_it_is_first_read(self, loaded: list[tuple[Any, ...]]) -> None:
        source = open_source("openai/gsm8k")
        assert not loaded
        assert list(source) == list(source)
        assert len(loaded) == 1

    def test_all_of_a_runs_datasets_are_downloaded_before_one_is_read(
        self, loaded: list[tuple[Any, ...]], tmp_path: Path
    ) -> None:
        (tmp_path / "a.jsonl").write_text("not read\n")
        opened(SFTConfig(data=[str(tmp_path / "a.jsonl"), "me/train"], eval_data=["me/eval"]))
        assert [path for path, *_ in loaded] == ["me/train", "me/eval"]

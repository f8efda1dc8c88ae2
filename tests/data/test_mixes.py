from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from hymba_tune.config import KeptDataOptions
from hymba_tune.data import build_dataset, open_sources, read_training_data
from hymba_tune.errors import ConfigError, DataError
from hymba_tune.train.screen import Screen


def rows_of(folder: Path, name: str, columns: Sequence[str], count: int) -> str:
    path = folder / name
    path.write_text("".join(json.dumps({c: f"{path.stem} {c} {i}" for c in columns}) + "\n" for i in range(count)))
    return str(path)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    columns = ("prompt", "completion")
    return [rows_of(tmp_path, "a.jsonl", columns, 200), rows_of(tmp_path, "b.jsonl", columns, 100)]


def test_weight_below_one_draws_rows_and_cap_limits_them(files: list[str], hymba: PreTrainedTokenizerFast) -> None:
    def texts(seed: int) -> list[str]:
        sources = open_sources(files, [0.25, 1], [200, 30])
        dataset, report = build_dataset(sources, hymba, max_length=64, seed=seed)
        assert [source.kept for source in report.sources] == [len(dataset) - 30, 30]
        assert 30 < report.sources[0].kept < 70
        return [hymba.decode(row["input_ids"]) for row in dataset]

    assert texts(0) == texts(0) != texts(1)
    assert len(set(texts(0))) == len(texts(0))
    assert "b prompt 29" in texts(0)[-1]


def test_weight_above_one_is_part_of_the_fingerprint(files: list[str], hymba: PreTrainedTokenizerFast) -> None:
    prints = [
        build_dataset(open_sources(files, weights), hymba, max_length=64)[1].fingerprint
        for weights in ([], [1, 1], [2, 1], [1, 2])
    ]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def test_weight_above_one_repeats_training_rows_only(files: list[str], hymba: PreTrainedTokenizerFast) -> None:
    options = KeptDataOptions(data=files, weights=[1, 3], caps=[100, 50], eval_split=0.1, max_length=64)
    data = read_training_data(options, hymba, seed=0, prompts=1, working=Screen().working)
    assert data.held_out is not None
    train, held_out = ([str(row["input_ids"]) for row in part] for part in (data.train, data.held_out))
    assert len(held_out) == 15
    assert not set(train) & set(held_out)
    assert len(set(train)) == 135
    assert 200 < len(train) < 250
    assert data.report.shares() == "a.jsonl 100 rows · b.jsonl 150 rows (50 × 3)"


@pytest.mark.parametrize(
    ("weights", "caps", "message"),
    [
        ([1], [], r"--weights has 1 value, --data 2\.(.|\n)*one for each source"),
        ([], [1, 2, 3], r"--caps has 3 values, --data 2\."),
        ([1, 0], [], r"--weights 0 is not above 0"),
        ([1, float("inf")], [], r"--weights inf is too large\.\n  expected   a number above 0, at most 1,000$"),
        ([1, 1e308], [], r"--weights 1e\+308 is too large"),
        ([], [-5, 1], r"--caps -5 is not above 0"),
    ],
)
def test_weights_that_do_not_match_the_sources_are_refused(
    weights: list[float], caps: list[int], message: str, files: list[str]
) -> None:
    with pytest.raises(ConfigError, match=message):
        open_sources(files, weights, caps)


def test_mix_gives_each_source_its_own_settings(tmp_path: Path, hymba: PreTrainedTokenizerFast) -> None:
    (tmp_path / "data").mkdir()
    rows_of(tmp_path / "data", "math.jsonl", ("question", "answer"), 100)
    rows_of(tmp_path / "data", "math-test.jsonl", ("question", "answer"), 7)
    chats = rows_of(tmp_path, "talk.jsonl", ("prompt", "completion"), 20)
    mix = tmp_path / "data" / "mix.yaml"
    mix.write_text(
        "- path: math.jsonl\n  weight: 2\n  max_rows: 10\n  map: {prompt: question, completion: answer}\n"
        f"  eval_data: math-test.jsonl\n- path: {chats}\n"
    )
    options = KeptDataOptions(data=[str(mix)], max_length=64)
    data = read_training_data(options, hymba, seed=0, prompts=1, working=Screen().working)
    assert [(source.weight, source.kept) for source in data.report.sources] == [(2.0, 10), (1.0, 20)]
    assert len(data.train) == 40
    assert data.held_out is not None
    assert len(data.held_out) == 7
    assert data.held_out_sources == {"math-test.jsonl": 7}
    assert "math-test question 0" in data.prompts[0][0].messages[0].content
    with pytest.raises(ConfigError, match=rf"--weights cannot be used with {mix}, which is a mix"):
        open_sources([str(mix)], [1])


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ("[", DataError, r"Cannot read the mix .*mix\.yaml: "),
        ("{}", DataError, r"it is not a list\.\n *expected +a list of sources"),
        ("- a.jsonl", DataError, r"mix\.yaml, source 1: it has no path"),
        ("- {path: a.jsonl, wieght: 1}", DataError, r'there is no "wieght"(.|\n)*did you mean weight\?'),
        ("- {path: a.jsonl, map: question}", DataError, "its map is not a mapping"),
        ("- {path: a.jsonl, map: {promt: question}}", ConfigError, '"promt" is not known'),
        ("- {path: a.jsonl, weight: 0}", ConfigError, "source 1: weight 0 is not above 0"),
        ("- {path: a.jsonl, weight: heavy}", ConfigError, "source 1: weight 'heavy' is not a number"),
        ("- {path: a.jsonl, max_rows: 1.5}", ConfigError, "source 1: max_rows 1.5 is not a whole number"),
        ("- {path: c.jsonl}", DataError, r"Cannot find c\.jsonl"),
    ],
)
def test_error_in_a_mix_names_its_source(
    content: str, error: type[Exception], message: str, tmp_path: Path, files: list[str]
) -> None:
    del files
    (tmp_path / "mix.yaml").write_text(content)
    with pytest.raises(error, match=message):
        open_sources([str(tmp_path / "mix.yaml")])

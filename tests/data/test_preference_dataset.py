"""Encoded answers have the tokens of the whole conversation, and every row is counted."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from hymba_tune.checkpoint import load_tokenizer
from hymba_tune.config import KeptDataOptions, OnBadRow
from hymba_tune.data import open_sources, read_preferences
from hymba_tune.data.chat import Encoded, encode, encode_prompt
from hymba_tune.data.comparisons import split_answers
from hymba_tune.data.formats import Conversation
from hymba_tune.data.preference_dataset import PreferenceReport, build_preferences
from hymba_tune.data.preferences import parse_pair
from hymba_tune.data.rows import RowError
from hymba_tune.data.templates import with_chat_template
from hymba_tune.errors import DataError
from hymba_tune.registry import resolve_model
from tests.preferences import pairs


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return with_chat_template(load_tokenizer(resolve_model("hymba-nano").folder))


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def build(
    rows: list[Any], tokenizer: PreTrainedTokenizerBase, folder: Path, **changes: Any
) -> tuple[Dataset, PreferenceReport]:
    path = write(folder / "rows.jsonl", rows)
    return build_preferences(open_sources([str(path)]), tokenizer, **{"paired": True, "max_length": 512} | changes)


def test_prompt_and_answer_have_the_tokens_of_the_conversation(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    data, _ = build(pairs(), tokenizer, tmp_path)
    for row, source in zip(data, pairs(), strict=True):
        pair = parse_pair(source)
        prompt = Conversation(pair.chosen.messages[:-1])
        assert row["prompt_ids"] == encode_prompt(prompt, tokenizer)
        for side, conversation in {"chosen_ids": pair.chosen, "rejected_ids": pair.rejected}.items():
            (whole,) = encode(conversation, tokenizer, 512)
            both = row["prompt_ids"] + row[side]
            assert both == whole.input_ids[: len(both)]
            assert row[side] == [label for label in whole.labels if label != -100]
            assert row[side][-1] == tokenizer.eos_token_id


def test_tokens_across_the_border_belong_to_the_answers() -> None:
    chosen = Encoded([1, 2, 3, 4], [-100, -100, 3, 4])
    rejected = Encoded([1, 5, 6, 7, 9], [-100, -100, -100, 7, -100])
    assert split_answers([chosen, rejected]) == ([1], [[2, 3, 4], [5, 6, 7]])


def test_report_counts_pairs_and_tokens(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows = [*pairs(3), pairs(1)[0] | {"score_chosen": 1, "score_rejected": 1}]
    rows[0] = rows[0] | {"rejected": "No."}
    data, report = build(rows, tokenizer, tmp_path)
    assert (report.rows, report.pairs, report.ties, report.chosen_longer) == (4, 4, 1, 1)
    sizes = [(len(row["prompt_ids"]), len(row["chosen_ids"]), len(row["rejected_ids"])) for row in data]
    assert report.learned == sum(chosen + rejected for _, chosen, rejected in sizes)
    assert report.tokens == report.learned + 2 * sum(prompt for prompt, _, _ in sizes)
    assert report.longest == max(prompt + max(answers) for prompt, *answers in sizes)
    assert report.counts()["ties"] == 1
    assert data[3]["place"].endswith("rows.jsonl, line 4")


def test_fingerprint_is_the_same_in_every_format(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    def hh(row: dict[str, str], side: str) -> str:
        return f"\n\nHuman: {row['prompt']}\n\nAssistant: {row[side]}"

    texts = [{side: hh(row, side) for side in ("chosen", "rejected")} for row in pairs(4)]
    prints = [build(rows, tokenizer, tmp_path)[1].fingerprint for rows in (pairs(4), texts, pairs(5))]
    assert prints[0] == prints[1] != prints[2]


def test_bad_row_is_named_with_its_extent(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows = [*pairs(2), {"prompt": "a"}, "{", *pairs(1)]
    with pytest.raises(RowError, match=r'rows\.jsonl, line 3: it has no "chosen"(.|\n)*2 such rows in the file'):
        build(rows, tokenizer, tmp_path)


def test_skipped_rows_are_counted_and_listed(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    same = {"prompt": "Is it?", "chosen": "Yes.", "rejected": "Yes."}
    data, report = build([same, *pairs(2), "{", same], tokenizer, tmp_path, on_bad_row=OnBadRow.skip)
    assert (len(data), report.rows, report.bad_rows, report.identical) == (2, 5, 3, 2)
    report.write_dropped(tmp_path / "dropped.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "dropped.jsonl").read_text().splitlines()]
    assert [line["line"] for line in lines] == [1, 4, 5]
    assert lines[0]["what"] == '"chosen" and "rejected" are the same'


def test_answers_are_cut_to_the_maximum_length(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows = [{"prompt": "Is it?", "chosen": "Yes, " * 20 + "sure.", "rejected": "No."}]
    (whole,), _ = build(rows, tokenizer, tmp_path)
    (row,), report = build(rows, tokenizer, tmp_path, max_length=len(whole["prompt_ids"]) + 9)
    assert row["chosen_ids"] == whole["chosen_ids"][:9]
    assert row["rejected_ids"] == whole["rejected_ids"]
    assert report.cut == 1


def test_pairs_that_differ_only_past_max_length_are_dropped(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows = [
        *pairs(1),
        {"prompt": "word " * 40, "chosen": "Yes.", "rejected": "No."},
        {"prompt": "Is it?", "chosen": "well, " * 40 + "yes", "rejected": "well, " * 40 + "no"},
    ]
    data, report = build(rows, tokenizer, tmp_path, max_length=48)
    assert (len(data), report.too_long, report.bad_rows) == (1, 2, 0)
    report.write_dropped(tmp_path / "dropped.jsonl")
    whats = [json.loads(line)["what"] for line in (tmp_path / "dropped.jsonl").read_text().splitlines()]
    assert "past --max-length 48" in whats[0]
    assert whats[0].startswith("its answer begins at token")
    assert whats[1] == "its answers differ only past --max-length 48"
    with pytest.raises(DataError, match=r"Nothing to train on in .*: of 1 rows, 1 are too long(.|\n)*larger --max-len"):
        build(rows[1:2], tokenizer, tmp_path, max_length=48)


def test_unpaired_answers_are_encoded_with_labels(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    single = {"prompt": "Is it?", "completion": "Yes.", "label": False}
    data, report = build([single, *pairs(2)], tokenizer, tmp_path, paired=False)
    paired, _ = build(pairs(2), tokenizer, tmp_path)
    assert data["label"][:] == [False, True, False, True, False]
    assert data["completion_ids"][1:3] == [paired[0]["chosen_ids"], paired[0]["rejected_ids"]]
    assert (report.pairs, report.good, report.bad) == (0, 2, 3)


def read(tokenizer: PreTrainedTokenizerBase, *, paired: bool, **options: Any) -> Any:
    return read_preferences(
        KeptDataOptions(cache=False, **options),
        tokenizer,
        paired=paired,
        seed=0,
        prompts=2,
        working=lambda _: nullcontext(lambda _: None),
    )


def test_pairs_are_held_out_and_prompts_sampled(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", pairs(20))
    data = read(tokenizer, paired=True, data=[str(path)], eval_split=0.2)
    assert (len(data.train), len(data.held_out)) == (16, 4)
    assert [(prompt.messages[-1].content, answer) for prompt, answer in data.prompts] == [
        (row["prompt"], row["chosen"]) for row in pairs(2)
    ]
    own = read(tokenizer, paired=True, data=[str(path)], eval_data=[str(path)], eval_max_rows=7)
    assert (len(own.train), len(own.held_out)) == (20, 7)


def test_unpaired_answers_are_shuffled_and_good_ones_sampled(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = write(tmp_path / "pairs.jsonl", pairs(20))
    data = read(tokenizer, paired=False, data=[str(path)], eval_split=0)
    labels = data.train["label"][:]
    assert sum(labels) == 20
    assert labels != [True, False] * 20
    assert [answer for _, answer in data.prompts] == [row["chosen"] for row in pairs(2)]


@pytest.mark.parametrize("paired", [True, False])
def test_held_out_pairs_of_a_source_are_used(tokenizer: PreTrainedTokenizerBase, tmp_path: Path, paired: bool) -> None:
    for name, rows in {"a": pairs(8), "b": pairs(4), "a-eval": pairs(12)[8:], "b-eval": pairs(20)[12:]}.items():
        write(tmp_path / f"{name}.jsonl", rows)
    mix = tmp_path / "mix.yaml"
    mix.write_text(
        "- {path: a.jsonl, eval_data: a-eval.jsonl, weight: 3}\n- {path: b.jsonl, eval_data: b-eval.jsonl}\n"
    )
    data = read(tokenizer, paired=paired, data=[str(mix)], eval_max_rows=8)
    answers = 1 if paired else 2
    places = Counter(place.split(",")[0].rpartition("/")[2] for place in data.train["place"])
    assert places == {"a.jsonl": 3 * 8 * answers, "b.jsonl": 4 * answers}
    held_out = [place.split(",")[0].rpartition("/")[2] for place in data.held_out["place"]]
    assert held_out == ["a-eval.jsonl"] * 4 + ["b-eval.jsonl"] * 4
    assert data.prompts[0][1] == pairs(12)[8]["chosen"]

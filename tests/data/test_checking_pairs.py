from __future__ import annotations

from collections.abc import Sequence

import pytest
from transformers import PreTrainedTokenizerFast

from hymba_tune.config import OnBadRow
from hymba_tune.data.check_counts import Check
from hymba_tune.data.check_facts import facts, next_commands, overview, problems
from hymba_tune.data.check_page import check_page
from hymba_tune.data.checking import check_sources
from hymba_tune.data.preference_dataset import build_preferences
from hymba_tune.errors import DataError
from tests.data.inputs import source

LONGER = {"prompt": "Hi", "chosen": "Hello to you all, and welcome", "rejected": "No"}
TIE = {"prompt": "Bye", "chosen": "Well", "rejected": "So long", "score_chosen": 3, "score_rejected": 3}
SAME = {"prompt": "Hi", "chosen": "Hello", "rejected": "Hello"}


def check(rows: Sequence[object], tokenizer: PreTrainedTokenizerFast, max_length: int = 64) -> Check:
    return check_sources([source(rows)], tokenizer, max_length=max_length)


def test_counts_equal_those_of_a_run(hymba: PreTrainedTokenizerFast) -> None:
    differ_late = {"prompt": "Hi", "chosen": "word " * 100 + "a", "rejected": "word " * 100 + "b"}
    rows = [LONGER, TIE, {**TIE, "prompt": "word " * 100}, {**LONGER, "chosen": "word " * 100}, differ_late]
    result = check(rows, hymba)
    _, report = build_preferences([source(rows)], hymba, paired=True, max_length=64)
    same = ("rows", "bad_rows", "too_long", "cut", "tokens", "learned")
    assert [getattr(result, name) for name in same] == [getattr(report, name) for name in same]
    assert result.too_long == 2
    assert result.usable


def test_answers_that_the_template_makes_equal_are_identical_in_check_and_run(hymba: PreTrainedTokenizerFast) -> None:
    rows = [
        {"prompt": "u", "chosen": "good", "rejected": "good "},
        {"prompt": "u", "chosen": "good", "rejected": "bad"},
    ]
    result = check(rows, hymba)
    assert result.pairs is not None
    data, report = build_preferences([source(rows)], hymba, paired=True, max_length=64, on_bad_row=OnBadRow.skip)
    assert (result.pairs.identical, result.bad_rows, result.too_long) == (1, 1, 0)
    assert (report.identical, report.bad_rows, report.too_long, len(data)) == (1, 1, 0, 1)
    with pytest.raises(DataError, match="as the model reads them, are the same"):
        build_preferences([source(rows)], hymba, paired=True, max_length=64)


def test_answers_with_equal_tokens_are_no_pair(hymba: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": "u", "chosen": "a b", "rejected": "a▁b"}, LONGER]  # SentencePiece writes a space as ▁
    result = check(rows, hymba)
    _, report = build_preferences([source(rows)], hymba, paired=True, max_length=64)
    assert result.too_long == report.too_long == 1
    assert report.first_dropped is not None
    assert report.first_dropped.what == "its answers have equal tokens"


def test_ties_identical_pairs_and_length_bias_are_reported(hymba: PreTrainedTokenizerFast) -> None:
    result = check([LONGER, {**LONGER, "prompt": "Hey"}, {**LONGER, "prompt": "Ho"}, TIE, SAME, LONGER], hymba)
    pairs = facts(result)["preferences"]
    assert (pairs["rows"], pairs["ties"], pairs["identical"]) == (5, 1, 1)
    assert (pairs["chosen_longer"], pairs["rejected_longer"], pairs["chosen_longer_share"]) == (4, 1, 0.8)
    assert result.duplicates.examples == [("support.jsonl, line 6", "support.jsonl, line 1")]
    whats = [problem.what for problem in problems(result)]
    assert '1 row: "chosen" and "rejected" are the same' in whats
    assert "1 pair: both answers have the same score" in whats
    assert "the better answer is the longer one in 80% of the pairs" in whats
    assert ("preferences", "5 pairs, 1 ties, 1 identical; chosen longer in 80%") in overview(result)
    assert result.files[0].formats == {"chosen and rejected": 6}
    assert next_commands(result, ["a"], "m", [], 64)[0][1].startswith("hymba-tune dpo --data a --model m")
    assert "The chosen answer is longer in 80\N{NO-BREAK SPACE}% of the pairs." in check_page(
        result, model="m", commands=[]
    )


def test_pairs_under_other_names_are_recognized(hymba: PreTrainedTokenizerFast) -> None:
    rows = [{"q": "Hi", "good": "Hello", "bad": "No"}]
    mapping = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    result = check_sources([source(rows)], hymba, max_length=64, mapping=mapping)
    assert result.pairs is not None
    assert result.pairs.rows == 1

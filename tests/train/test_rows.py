"""The rows of a batch are found."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset

from hymba_tune.train.rows import find_rows

TEXTS = [[5, 6, 7], [5, 6], [8], [5, 6, 8], [8, 9, 5, 6], [5, 6]]


@pytest.fixture
def rows() -> Dataset:
    return Dataset.from_dict({"input_ids": TEXTS, "place": [f"line {number}" for number in range(1, 7)]})


def padded(*texts: list[int], left: bool = False) -> dict[str, torch.Tensor]:
    width = max(map(len, texts))
    pads = [[0] * (width - len(text)) for text in texts]
    join = (lambda pad, text: pad + text) if left else (lambda pad, text: text + pad)
    ones = [[1] * len(text) for text in texts]
    return {
        "input_ids": torch.tensor([join(pad, text) for pad, text in zip(pads, texts, strict=True)]),
        "attention_mask": torch.tensor([join(pad, one) for pad, one in zip(pads, ones, strict=True)]),
    }


def packed(*texts: list[int]) -> dict[str, torch.Tensor]:
    return {
        "input_ids": torch.tensor([[token for text in texts for token in text]]),
        "position_ids": torch.tensor([[place for text in texts for place in range(len(text))]]),
    }


@pytest.mark.parametrize("order", [[4], [4, 0, 2], [3, 1]])
def test_rows_of_any_layout_are_found_in_the_batchs_order(order: list[int], rows: Dataset) -> None:
    texts = [TEXTS[index] for index in order]
    for batch in (padded(*texts), padded(*texts, left=True), packed(*texts)):
        assert find_rows(batch, rows) == order


def test_first_of_rows_that_read_the_same_is_named(rows: Dataset) -> None:
    assert find_rows(padded(TEXTS[5]), rows) == [1]


def test_preferences_are_found_by_either_answer() -> None:
    pairs = Dataset.from_dict({"prompt_ids": [[5], [5, 6]], "chosen_ids": [[6, 7], [8]], "rejected_ids": [[9, 9], [7]]})
    # A batch of pairs holds the better answers, then the worse ones; [5, 6, 7] is read in either row.
    assert find_rows(padded([5, 6, 8], [5, 6, 7]), pairs) == [1, 0]
    assert find_rows(padded([5, 9, 9]), pairs) == [0]
    judged = Dataset.from_dict({"prompt_ids": [[5], [5, 6]], "completion_ids": [[6, 7], [8]], "label": [True, False]})
    assert find_rows(padded([5, 6, 8]), judged) == [1]


def test_text_that_no_row_holds_is_not_found(rows: Dataset) -> None:
    assert find_rows(padded([5, 6, 7, 8], [8]), rows) == [2]


def test_rows_far_behind_are_found(rows: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hymba_tune.train.rows.READ", 2)
    assert find_rows(packed(TEXTS[4], TEXTS[0]), rows.select(range(6))) == [4, 0]
    assert find_rows(packed(TEXTS[4], TEXTS[0]), rows.select([0, 4])) == [1, 0]


@pytest.mark.parametrize("answers", ["chosen_ids", "completion_ids"])
def test_rows_of_a_prompt_and_answers_are_found_by_both(answers: str) -> None:
    rows = Dataset.from_dict({"prompt_ids": [[5, 6], [5], [7]], answers: [[7], [6, 8], [5]]})
    assert find_rows(padded([5, 6, 8], [7, 5], [5, 6, 9]), rows) == [1, 2]

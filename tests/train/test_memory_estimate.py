from __future__ import annotations

from typing import Any

import datasets
import pytest
import torch

from hymba_tune.config import DPOConfig, SFTConfig
from hymba_tune.data import DataReport
from hymba_tune.footprint import GPU_RESERVE, process_overhead
from hymba_tune.train.memory_estimate import full_batch, largest_batch, text_lengths
from hymba_tune.train.setup import Data


def data(columns: dict[str, Any], longest: int) -> Data:
    report = DataReport(tokens=100, learned=50, longest=longest)
    return Data(datasets.Dataset.from_dict(columns), None, {}, report, [], [], None)


def rows(*lengths: int) -> list[list[int]]:
    return [[1] * length for length in lengths]


def test_texts_are_as_long_as_their_prompt_and_answer() -> None:
    assert text_lengths(datasets.Dataset.from_dict({"input_ids": rows(2, 5), "labels": rows(2, 5)})).tolist() == [
        [2],
        [5],
    ]
    pairs = {"prompt_ids": rows(2, 3), "chosen_ids": rows(1, 4), "rejected_ids": rows(2, 1)}
    assert text_lengths(datasets.Dataset.from_dict(pairs)).tolist() == [[3, 4], [7, 4]]


def test_largest_batch_is_one_that_may_be_drawn() -> None:
    lengths = (10, 20, 30, 40)
    dataset = data({"input_ids": rows(*lengths)}, longest=40)
    whole = largest_batch(SFTConfig(batch_size=4), dataset)
    assert (whole.tokens, whole.longest, whole.learned, whole.places) == (100, 40, 50, 160)
    single = largest_batch(SFTConfig(batch_size=1, epochs=1), dataset)
    assert (single.tokens, single.places) == (40, 40)
    # Drawn often enough, the two longest rows meet.
    assert largest_batch(SFTConfig(batch_size=2, steps=200), dataset).tokens == 70
    assert largest_batch(SFTConfig(batch_size=2, steps=1), dataset).tokens <= 70


def test_packed_rows_are_full() -> None:
    dataset = data({"input_ids": rows(10, 20)}, longest=20)
    batch = largest_batch(SFTConfig(batch_size=2, max_length=64, packing=True), dataset)
    assert (batch.tokens, batch.longest, batch.learned) == (128, 20, 64)


def test_both_answers_of_a_pair_are_in_a_batch() -> None:
    assert full_batch(DPOConfig(batch_size=2, max_length=64)).tokens == 256
    assert full_batch(SFTConfig(batch_size=2, max_length=64)).tokens == 128


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_process_holds_more_than_its_libraries(dtype: torch.dtype) -> None:
    assert process_overhead(torch.device("cpu"), dtype) > 2**27
    assert process_overhead(torch.device("cuda"), dtype) == GPU_RESERVE

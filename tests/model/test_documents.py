"""Malformed inputs are refused with a message that names the row and what was expected."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from hymba_tune.model import HymbaCache
from hymba_tune.model.cache import CACHE_NAME
from tests.tiny import random_texts, tiny_model

IDS = torch.stack(random_texts([6, 6]))
ONES = torch.ones_like(IDS)

MALFORMED: dict[str, tuple[dict[str, Any], str]] = {
    "row_of_padding": (
        {"attention_mask": torch.tensor([[1] * 6, [0] * 6])},
        "row 1 of attention_mask is all padding; expected at least one token",
    ),
    "mask_of_another_length": (
        {"attention_mask": torch.ones(2, 5)},
        r"attention_mask has shape \(2, 5\); expected \(2, 6\)",
    ),
    "mask_of_another_batch": (
        {"attention_mask": torch.ones(3, 6)},
        r"attention_mask has shape \(3, 6\); expected \(2, 6\)",
    ),
    "mask_of_pairs": (
        {"attention_mask": torch.ones(2, 1, 6, 6)},
        r"attention_mask has shape \(2, 1, 6, 6\); expected \(2, 6\)",
    ),
    "positions_that_jump": (
        {"position_ids": torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 5, 6, 7, 8]])},
        "position_ids of row 1 jump to 5 at its token 2; expected them to start at 0",
    ),
    "positions_that_do_not_start_at_0": (
        {"position_ids": torch.tensor([[1, 2, 3, 4, 5, 6]])},
        "position_ids of row 0 jump to 1 at its token 0",
    ),
    "positions_that_continue_in_the_next_row": (
        {"position_ids": torch.arange(12).view(2, 6)},
        "position_ids of row 1 jump to 6 at its token 0",
    ),
    "positions_that_go_back": (
        {"position_ids": torch.tensor([[0, 1, 2, 1, 2, 3]])},
        "position_ids of row 0 jump to 1 at its token 3",
    ),
    "positions_that_jump_behind_padding": (
        {"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6]), "position_ids": torch.arange(6)[None]},
        "position_ids of row 0 jump to 2 at its token 0",
    ),
    "positions_of_another_shape": (
        {"position_ids": torch.arange(5)[None]},
        r"position_ids has shape \(1, 5\); expected \(2, 6\) or \(1, 6\)",
    ),
    "offsets_from_1": ({"cu_seq_lens_q": torch.tensor([1, 12])}, r"cu_seq_lens_q is \[1, 12\]; expected offsets"),
    "offsets_that_end_early": ({"cu_seq_lens_q": torch.tensor([0, 4, 11])}, "rise from 0 to the 12 tokens"),
    "offsets_that_fall": ({"cu_seq_lens_q": torch.tensor([0, 7, 5, 12])}, "rise from 0 to the 12 tokens"),
    "offsets_of_an_empty_text": ({"cu_seq_lens_q": torch.tensor([0, 5, 5, 12])}, "rise from 0 to the 12 tokens"),
    "offsets_of_nothing": ({"cu_seq_lens_q": torch.tensor([0])}, "rise from 0 to the 12 tokens"),
    "offsets_that_count_padding": (
        {"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6]), "cu_seq_lens_q": torch.tensor([0, 6, 12])},
        "rise from 0 to the 10 tokens",
    ),
    "ids_and_embeddings": ({"inputs_embeds": torch.ones(2, 6, 24)}, "give either input_ids or inputs_embeds"),
    "neither_ids_nor_embeddings": ({"input_ids": None}, "give either input_ids or inputs_embeds"),
    "no_tokens": ({"input_ids": IDS[:, :0]}, r"the inputs have shape \(2, 0\); expected at least one token"),
    "foreign_cache": ({"cache": DynamicCache()}, "DynamicCache; expected a HymbaCache. PEFT's prefix"),
    "cache_of_packed_rows": (
        {"use_cache": True, "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])},
        "4 texts in 2 rows; a cache needs one text per row",
    ),
}


@pytest.mark.parametrize(("inputs", "message"), MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_input_is_refused(inputs: dict[str, Any], message: str) -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        model(**{"input_ids": IDS} | inputs)
    with pytest.raises(ValueError, match=message):
        model.model(**{"input_ids": IDS} | inputs)


def test_cache_of_another_batch_is_refused() -> None:
    model = tiny_model()
    cache = model(IDS, use_cache=True)[CACHE_NAME]
    with pytest.raises(ValueError, match="the cache holds 2 texts; expected 1, one for each row"):
        model(IDS[:1], cache=cache)


@pytest.mark.parametrize("shape", [(2, 0), (3, 9), (2, 2)])
def test_mask_of_another_shape_is_refused_with_a_cache(shape: tuple[int, int]) -> None:
    model = tiny_model()
    cache = model(IDS, use_cache=True)[CACHE_NAME]
    with pytest.raises(ValueError, match="attention_mask has shape"):
        model(IDS[:, :3], cache=cache, attention_mask=torch.ones(shape))


def test_cache_of_growing_bases_is_refused() -> None:
    model = tiny_model(rope_type="dynamic_ntk")
    with pytest.raises(ValueError, match="rope_type dynamic_ntk rotates all keys anew as a text grows"):
        model(IDS, cache=HymbaCache(model.config))

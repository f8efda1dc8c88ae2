"""Which rows of the data a batch was made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import torch
from torch import Tensor

TEXT_COLUMNS = ("input_ids", "prompt_ids", "chosen_ids", "completion_ids")
"""Columns that make up a text that the model reads, in this order."""
READ = 10_000  # rows looked at at a time


def texts_of(batch: dict[str, Any]) -> list[list[int]]:
    """The token ids of each text of a batch, padded or packed, in order."""
    ids: Tensor = batch["input_ids"]
    if (positions := batch.get("position_ids")) is not None:
        starts = (positions.flatten() == 0).nonzero().flatten().tolist()
        return [part.tolist() for part in ids.flatten().tensor_split(starts[1:])]
    mask = batch.get("attention_mask", torch.ones_like(ids)).bool()
    return [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]


def find_rows(batch: dict[str, Any], rows: datasets.Dataset) -> list[int]:
    """Indices of the rows that a batch was made of: for each text, the first row that reads the same.

    Batches do not say which rows they were made of, least of all packed ones, and only a broken one needs to be asked.

    Args:
        batch: With ``input_ids`` and what tells its texts apart.
        rows: With ``input_ids``, or with a prompt and its answers, each of which makes a text with it.
    """
    wanted = {tuple(text): place for place, text in enumerate(texts_of(batch))}
    lengths = {len(text) for text in wanted}
    found: dict[int, int] = {}
    for parts in _parts_of_texts(rows.column_names):
        ids = rows.select_columns(parts).with_format("arrow")
        for start in range(0, len(rows), READ):
            table = ids[start : start + READ]
            for index, row in enumerate(zip(*(table[part] for part in parts), strict=True), start=start):
                if sum(map(len, row)) not in lengths:
                    continue
                place = wanted.get(tuple(token for part in row for token in part.as_py()))
                if place is not None:
                    found.setdefault(place, index)
    return list(dict.fromkeys(found[place] for place in sorted(found)))


def _parts_of_texts(columns: Sequence[str]) -> list[list[str]]:
    """The columns that make a text of a batch, one after the other; of the preferences two, the better answer first."""
    answers = [name for name in ("chosen_ids", "rejected_ids", "completion_ids") if name in columns]
    return [["prompt_ids", name] for name in answers] or [["input_ids"]]


def places_of(batch: dict[str, Any], rows: datasets.Dataset) -> list[str]:
    """Where the rows of a batch were read from: ``my.jsonl, line 318``."""
    return [rows[index]["place"] for index in find_rows(batch, rows)]

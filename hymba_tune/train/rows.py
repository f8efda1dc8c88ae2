"""Finding the rows of the data that a batch was built from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import torch
from torch import Tensor

TEXT_COLUMNS = ("input_ids", "prompt_ids", "chosen_ids", "completion_ids")
"""Columns that make up a text for the model, in this order."""
READ = 10_000  # rows read at a time


def texts_of(batch: dict[str, Any]) -> list[list[int]]:
    """Return the token ids of each text of a batch, padded or packed, in order."""
    ids: Tensor = batch["input_ids"]
    if (positions := batch.get("position_ids")) is not None:
        starts = (positions.flatten() == 0).nonzero().flatten().tolist()
        return [part.tolist() for part in ids.flatten().tensor_split(starts[1:])]
    mask = batch.get("attention_mask", torch.ones_like(ids)).bool()
    return [row[tokens].tolist() for row, tokens in zip(ids, mask, strict=True)]


def find_rows(batch: dict[str, Any], rows: datasets.Dataset) -> list[int]:
    """Return the indices of the rows that a batch was built from: for each text, the first row with the same tokens.

    Batches, packed ones above all, do not carry their rows' indices, and only a batch with a bad loss needs them.

    Args:
        batch: A batch with ``input_ids``, and ``position_ids`` or ``attention_mask`` where it holds several texts.
        rows: Rows with ``input_ids``, or with a prompt and its answers, each of which makes a text with the prompt.
    """
    texts = {tuple(text): place for place, text in enumerate(texts_of(batch))}
    lengths = {len(text) for text in texts}
    indices: dict[int, int] = {}
    for parts in _parts_of_texts(rows.column_names):
        ids = rows.select_columns(parts).with_format("arrow")
        for start in range(0, len(rows), READ):
            table = ids[start : start + READ]
            for index, row in enumerate(zip(*(table[part] for part in parts), strict=True), start=start):
                if sum(map(len, row)) not in lengths:
                    continue
                place = texts.get(tuple(token for part in row for token in part.as_py()))
                if place is not None:
                    indices.setdefault(place, index)
    return list(dict.fromkeys(indices[place] for place in sorted(indices)))


def _parts_of_texts(columns: Sequence[str]) -> list[list[str]]:
    """Return the columns that make up each text of a row: of a pair two texts, the chosen one first."""
    answers = [name for name in ("chosen_ids", "rejected_ids", "completion_ids") if name in columns]
    return [["prompt_ids", name] for name in answers] or [["input_ids"]]


def places_of(batch: Any, rows: datasets.Dataset) -> list[str]:
    """Return where the rows of a batch were read from: ``my.jsonl, line 318``."""
    if isinstance(batch, list):  # of rows as they are
        return list(dict.fromkeys(row["place"] for row in batch))
    return [rows[index]["place"] for index in find_rows(batch, rows)]

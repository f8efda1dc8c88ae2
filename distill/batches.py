"""Batches that say which rows they are made of."""

from __future__ import annotations

from typing import Any

import torch

COLUMNS = ["input_ids", "labels", "row"]
"""Of the rows that are trained on; ``row`` is a row's number at each of its tokens."""


class Numbered:
    """A collator whose batches say where which rows stand.

    They have ``rows``, ``(R, 2)`` int64: a row's number, and the place of its first token among all of the batch's, its
    rows laid end to end, padding included.

    Args:
        collator: Makes padded batches, or packed ones of one row.
    """

    def __init__(self, collator: Any) -> None:
        self._collator = collator

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch of examples with `COLUMNS`, and ``seq_lengths`` where they are packed."""
        batch: dict[str, Any] = self._collator(examples)
        width = batch["input_ids"].shape[1] if batch["input_ids"].shape[0] > 1 else 0
        places, end = [], 0
        for number, example in enumerate(examples):
            begin = number * width if width else end
            at = begin
            for length in example.get("seq_lengths", [len(example["input_ids"])]):
                places.append((example["row"][at - begin], at))
                at += length
            end = at
        return batch | {"rows": torch.tensor(places)}


def examples_of(batch: dict[str, Any]) -> list[dict[str, Any]]:
    """What a padded batch was collated of."""
    examples = []
    for number, (row, _) in enumerate(batch["rows"].tolist()):
        read = batch["attention_mask"][number].bool()
        ids, labels = (batch[name][number][read].tolist() for name in ("input_ids", "labels"))
        examples.append({"input_ids": ids, "labels": labels, "row": [row] * len(ids)})
    return examples

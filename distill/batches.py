"""Batches with the numbers of their rows."""

from __future__ import annotations

from typing import Any

import torch

COLUMNS = ["input_ids", "labels", "row"]
"""The columns of training rows; ``row`` repeats a row's number at each of its tokens."""


class Numbered:
    """A collator that adds the numbers and positions of the rows to a batch.

    The column ``rows``, ``(R, 2)`` int64, has each row's number and the position of its first token in the flattened
    batch, padding included.

    Args:
        collator: A collator of padded batches, or of packed batches of one row.
    """

    def __init__(self, collator: Any) -> None:
        self._collator = collator

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate examples with `COLUMNS`, and with ``seq_lengths`` if they are packed."""
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
    """Return the examples of a padded batch."""
    examples = []
    for number, (row, _) in enumerate(batch["rows"].tolist()):
        read = batch["attention_mask"][number].bool()
        ids, labels = (batch[name][number][read].tolist() for name in ("input_ids", "labels"))
        examples.append({"input_ids": ids, "labels": labels, "row": [row] * len(ids)})
    return examples

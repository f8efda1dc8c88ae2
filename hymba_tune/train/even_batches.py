"""Even batches: all processes take equally many, and none of them trains on a row that another one has.

Accelerate would repeat the first rows of an epoch in its last batches, which would be learned and measured twice. Here
indices past the end of the data make the batches even; what they stand for is dropped from the batches again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import datasets
from torch.utils.data import Dataset, Sampler

from hymba_tune.data import IGNORED


@dataclass(frozen=True)
class Filler:
    """A row that only makes a batch even. It is no mapping, so that transformers leaves its columns alone.

    Attributes:
        row: A row that a process can run its model on where its batch has no others; it has no labels to learn.
    """

    row: dict[str, Any]


class FillerBatch(dict[str, Any]):
    """A batch of a filler alone, in a process that has no row when others have: it is run, and counts for nothing."""


class EvenRows(Dataset[Any]):
    """Rows with fillers past their end.

    Args:
        rows: The rows, at least one.
        multiple: The number that the number of rows and fillers together is a multiple of.
    """

    def __init__(self, rows: datasets.Dataset, multiple: int) -> None:
        self._rows = rows
        self._length = -(-len(rows) // multiple) * multiple

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any] | Filler:
        """Return a row, or a filler."""
        if index < len(self._rows):
            row: dict[str, Any] = self._rows[index]
            return row
        filler = dict(self._rows[0])
        if "labels" in filler:
            filler["labels"] = [IGNORED] * len(filler["labels"])
        return Filler(filler)


class EvenOrder(Sampler[int]):
    """The order of an epoch's rows, followed by the fillers.

    Args:
        order: The order of the rows alone.
        length: The number of rows and fillers.
    """

    def __init__(self, order: Sampler[int], length: int) -> None:
        self._order: Any = order
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        yield from self._order
        yield from range(len(self._order), self._length)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, on which a shuffled order depends."""
        if hasattr(self._order, "set_epoch"):
            self._order.set_epoch(epoch)


@dataclass(frozen=True)
class WithoutFillers:
    """A collator that drops fillers, unless a batch has nothing else.

    Attributes:
        collator: The collator of rows.
    """

    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]

    def __call__(self, examples: list[Any]) -> dict[str, Any]:
        """Collate the rows among examples to a batch; a filler, if there are none, to a `FillerBatch`."""
        rows = [example for example in examples if not isinstance(example, Filler)]
        return self.collator(rows) if rows else FillerBatch(self.collator([examples[0].row]))

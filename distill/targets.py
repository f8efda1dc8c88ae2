"""The training targets of rows: what the cache stores for a row, and what a batch carries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from hymba_tune.distill.projection import SparseTarget


@dataclass(frozen=True, slots=True)
class Targets:
    """The targets of a row, or of several concatenated rows: N tokens with k target tokens each, and S spans.

    Attributes:
        at: ``(N,)`` int64, ascending: the positions of the tokens that have a target.
        top: The target distributions of these tokens; with one tokenizer, the teacher's most likely tokens.
        spans: ``(S, 2)`` int64: the smallest spans ``[begin, end)`` of tokens whose ends are boundaries on both sides.
        span_log_likelihoods: ``(S,)`` float32: the teacher's log-likelihoods of the spans, nats.
    """

    at: Tensor
    top: SparseTarget
    spans: Tensor
    span_log_likelihoods: Tensor

    @classmethod
    def joined(cls, rows: Sequence[Self], offsets: Sequence[int]) -> Self:
        """Concatenate the targets of several rows.

        Args:
            rows: The targets, all with the same k.
            offsets: For each row, the position of its first token in the batch, ascending.
        """
        return cls(
            torch.cat([row.at + offset for row, offset in zip(rows, offsets, strict=True)]),
            SparseTarget(*map(torch.cat, zip(*(row.top for row in rows), strict=True))),
            torch.cat([row.spans + offset for row, offset in zip(rows, offsets, strict=True)]),
            torch.cat([row.span_log_likelihoods for row in rows]),
        )

    def split(self, tokens: Sequence[int], spans: Sequence[int]) -> list[Self]:
        """Return the targets of single rows from those of several, all of whose positions count from their own row.

        Args:
            tokens: For each row, the number of its tokens that have a target.
            spans: For each row, the number of its spans.
        """
        columns = self.at, *self.top
        by_row = zip(*(column.split(list(tokens)) for column in columns), strict=True)
        span_columns = zip(
            *(column.split(list(spans)) for column in (self.spans, self.span_log_likelihoods)), strict=True
        )
        return [
            type(self)(at, SparseTarget(*top), *rest) for (at, *top), rest in zip(by_row, span_columns, strict=True)
        ]

    def to(self, device: torch.device) -> Self:
        """Return the same targets on another device."""
        top = SparseTarget(*(part.to(device) for part in self.top))
        return type(self)(self.at.to(device), top, self.spans.to(device), self.span_log_likelihoods.to(device))

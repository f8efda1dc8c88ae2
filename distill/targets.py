"""What the student is taught at each token of its rows: what a teacher's pass leaves, and a batch brings along."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from hymba_tune.distill.projection import SparseTarget


@dataclass(frozen=True, slots=True)
class Targets:
    """Of a row of tokens, or of several laid end to end: N tokens with a target of k pieces, and S spans.

    Attributes:
        at: ``(N,)`` int64, ascending: which tokens are predicted. Learned tokens that are not here have no target.
        top: What is to be predicted there, known everywhere; where the tokenizers are the same, the teacher's likeliest
            tokens.
        spans: ``(S, 2)`` int64: the smallest spans ``[begin, end)`` of tokens that both sides bound.
        span_log_likelihoods: ``(S,)`` float32: the teacher's, nats.
    """

    at: Tensor
    top: SparseTarget
    spans: Tensor
    span_log_likelihoods: Tensor

    @classmethod
    def joined(cls, rows: Sequence[Self], offsets: Sequence[int]) -> Self:
        """Those of several rows, the tokens of each counted from its offset on.

        Args:
            rows: All of one k.
            offsets: Ascending, one for each row.
        """
        return cls(
            torch.cat([row.at + offset for row, offset in zip(rows, offsets, strict=True)]),
            SparseTarget(*map(torch.cat, zip(*(row.top for row in rows), strict=True))),
            torch.cat([row.spans + offset for row, offset in zip(rows, offsets, strict=True)]),
            torch.cat([row.span_log_likelihoods for row in rows]),
        )

    def to(self, device: torch.device) -> Self:
        """The same on another device."""
        top = SparseTarget(*(part.to(device) for part in self.top))
        return type(self)(self.at.to(device), top, self.spans.to(device), self.span_log_likelihoods.to(device))

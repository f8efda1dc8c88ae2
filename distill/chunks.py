"""Losses from hidden states and output layers, a few tokens at a time: no tensor is tokens × vocabulary in size."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from hymba_tune.footprint.machine import device_memory
from hymba_tune.model.autocast import to_autocast_dtype
from hymba_tune.model.chunked_head import chunked_log_probs, chunked_sum

CHUNK_BYTES = 1 << 26
"""Bytes of float32 logits held at a time, of both sides together. A loss holds up to six times that."""
CARD_SHARE = 128
"""A chunk on a GPU may take this part of its memory instead: few tokens take less time than their launches."""

TokenLoss = Callable[[Tensor, slice], Tensor]
"""From the student's logits ``(n, V)`` of some tokens, and the slice of these tokens, to their losses, ``(n,)``."""


class Head(NamedTuple):
    """Hidden states ``(T, d)`` and the output layer's weight ``(V, d)``, whose logits are not computed yet."""

    hidden: Tensor
    weight: Tensor

    def logits(self, rows: slice | Tensor) -> Tensor:
        """Compute the logits ``(n, V)`` of some tokens, in float32 or wider."""
        hidden = self.hidden[rows]
        return linear(hidden, self.weight.to(hidden.dtype)).to(torch.promote_types(hidden.dtype, torch.float32))


def chunk_bytes(device: torch.device) -> int:
    """Return the bytes of float32 logits held at a time on a device."""
    return max(CHUNK_BYTES, device_memory(device) // CARD_SHARE) if device.type == "cuda" else CHUNK_BYTES


def chunk_rows(*vocabularies: int, device: torch.device) -> int:
    """Return the number of tokens in a chunk, for a loss that needs logits over these vocabularies at once."""
    return max(1, chunk_bytes(device) // (4 * sum(vocabularies)))


def chunked_loss(student: Head, loss: TokenLoss, rows: int) -> Tensor:
    """Compute the sum of a loss over tokens, a chunk at a time; see `chunked_sum`.

    Args:
        student: The student's hidden states and output layer; both receive gradients.
        loss: The loss of the tokens of a chunk. Autograd differentiates it with respect to the student's logits only.
        rows: The number of tokens in a chunk; see `chunk_rows`.

    Returns:
        A float32 scalar (float64 for float64 hidden states).
    """
    wide = torch.promote_types(student.hidden.dtype, torch.float32)

    def chunk_loss(logits: Tensor, chunk: slice, needs_gradient: bool) -> tuple[Tensor, Tensor | None]:
        logits = logits.to(wide).requires_grad_(needs_gradient)
        with torch.set_grad_enabled(needs_gradient):
            total = loss(logits, chunk).sum()
        d_logits = torch.autograd.grad(total, logits)[0] if needs_gradient else None
        return total.detach(), d_logits

    return chunked_sum(student.hidden, student.weight, chunk_loss, rows)


def log_likelihood(student: Head, targets: Tensor, rows: int) -> Tensor:
    """Compute the log-probability of each target, for losses that need those of several tokens at once.

    Args:
        student: The student's hidden states and output layer; both receive gradients.
        targets: ``(T,)`` int64, one for each hidden state.
        rows: The number of tokens in a chunk.

    Returns:
        ``(T,)`` float32 (float64 for float64 hidden states), nats.
    """
    return chunked_log_probs(to_autocast_dtype(student.hidden), student.weight, targets, rows)[0]


def expand(begin: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """List all integers of some ranges ``[begin, end)``, one range after the other.

    Returns:
        The index of the range that each integer belongs to, and the integers.
    """
    counts = end - begin
    owner = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    before = counts.cumsum(0) - counts
    return owner, torch.arange(len(owner), device=counts.device) + (begin - before)[owner]

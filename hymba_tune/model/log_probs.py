"""Log-probabilities of given tokens that never hold the logits of all of them at once."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput

from .autocast import to_autocast_dtype
from .chunked_head import chunked_log_probs

CHUNK = 1024
"""Tokens whose logits are held at a time."""


@dataclass
class TokenScores(ModelOutput):
    """What TRL's preference trainers ask of a model: a value for each token but a row's first, 0 where none is asked.

    Attributes:
        log_probs: ``(B, L - 1)`` float32: of each token behind those before it, nats. The only one with a gradient.
        entropy: ``(B, L - 1)`` float32: of the distribution that the token was taken from, nats.
        mean_logits: ``(B, L - 1)`` float32: the mean over the vocabulary.
        is_top1: ``(B, L - 1)`` bool: whether no token was likelier.
    """

    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None


def score_tokens(hidden: Tensor, weight: Tensor, labels: Tensor, *, shifted: bool = False) -> TokenScores:
    """Score the tokens of rows, each text one row.

    Args:
        hidden: ``(B, L, d)``.
        weight: ``(V, d)``, of the head.
        labels: ``(B, L)``, -100 where no score is needed.
        shifted: Whether each label is what its own place is to predict. The scores are then ``(B, L)``.
    """
    hidden, targets = (hidden, labels) if shifted else (hidden[:, :-1], labels[:, 1:])
    scored = targets != -100
    values = chunked_log_probs(to_autocast_dtype(hidden[scored]), weight, targets[scored], CHUNK, statistics=True)
    rows = [value.new_zeros(scored.shape).masked_scatter(scored, value) for value in values]
    return TokenScores(*rows)

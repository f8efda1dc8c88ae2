"""Log-probabilities of given tokens, computed without holding the logits of all tokens at once."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput

from .autocast import to_autocast_dtype
from .chunked_head import chunked_log_probs

CHUNK = 1024
"""The number of tokens whose logits are held at a time."""


@dataclass
class TokenScores(ModelOutput):
    """The scores that TRL's preference trainers expect of a model, for each token but the first of a row.

    The scores are 0 at tokens with the label -100.

    Attributes:
        log_probs: ``(B, L - 1)`` float32, the log-probability of each token, nats. Only this field has a gradient.
        entropy: ``(B, L - 1)`` float32, the entropy of the distribution of each token, nats.
        mean_logits: ``(B, L - 1)`` float32, the mean of the logits over the vocabulary.
        is_top1: ``(B, L - 1)`` bool, whether the token was the most likely one.
    """

    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None


def score_tokens(hidden: Tensor, weight: Tensor, labels: Tensor, *, shifted: bool = False) -> TokenScores:
    """Score the tokens of rows that contain one text each.

    Args:
        hidden: Hidden states, ``(B, L, d)``.
        weight: The weight of the output layer, ``(V, d)``.
        labels: ``(B, L)``, -100 where no score is needed.
        shifted: Whether each label is the token that its position predicts. The scores are then ``(B, L)``.
    """
    hidden, targets = (hidden, labels) if shifted else (hidden[:, :-1], labels[:, 1:])
    scored = targets != -100
    values = chunked_log_probs(to_autocast_dtype(hidden[scored]), weight, targets[scored], CHUNK, statistics=True)
    rows = [value.new_zeros(scored.shape).masked_scatter(scored, value) for value in values]
    return TokenScores(*rows)

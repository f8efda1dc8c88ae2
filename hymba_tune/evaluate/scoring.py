"""The loss of texts: summed over tokens, independent of batches, and without the logits of all tokens in memory."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hymba_tune.data import IGNORED, Encoded
from hymba_tune.evaluate.texts import ScoredRow


@dataclass(frozen=True)
class TextScore:
    """Sums over the scored tokens of some texts.

    Attributes:
        nats: Sum of the negative log-probabilities of all scored tokens, end tokens included.
        tokens: Number of scored tokens.
        spelled: Number of UTF-8 bytes that the scored tokens spell.
        right: Number of scored tokens that are the model's likeliest ones.
        row_nats: The part of ``nats`` of each row.
    """

    nats: float
    tokens: int
    spelled: int
    right: int
    row_nats: Sequence[float] = ()

    @property
    def loss(self) -> float:
        """Mean loss per token, in nats."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """Perplexity per token."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text, which is comparable between models with different tokenizers."""
        return self.nats / math.log(2) / self.spelled if self.spelled else math.nan

    @property
    def accuracy(self) -> float:
        """Share of the scored tokens that are the model's likeliest ones."""
        return self.right / self.tokens


def score_rows(
    model: PreTrainedModel, rows: Iterable[ScoredRow], *, batch_size: int, progress: Callable[[int], None]
) -> TextScore:
    """Score rows in batches.

    Args:
        model: A model in evaluation mode.
        rows: Rows with at least one token to score.
        batch_size: Number of rows in a batch.
        progress: Called with the number of finished rows.
    """
    nats = 0.0
    row_nats = array("d")
    tokens = spelled = right = done = 0
    for batch in _batches(rows, batch_size):
        for log_probs, likeliest in score_tokens(model, [row.encoded for row in batch]):
            row_nats.append(-sum(log_probs))
            nats += row_nats[-1]
            right += sum(likeliest)
            tokens += len(log_probs)
        spelled += sum(row.spelled for row in batch)
        done += len(batch)
        progress(done)
    return TextScore(nats, tokens, spelled, right, row_nats)


def score_tokens(model: PreTrainedModel, rows: Sequence[Encoded]) -> list[tuple[list[float], list[bool]]]:
    """For each row: the log-probability of every labeled token, in nats, and whether it is the likeliest there."""
    ids, mask, labels = _padded(rows, model.device)
    with torch.inference_mode():
        scores = model(ids, attention_mask=mask, labels=labels, fused_lm_head=True)
    labeled = labels[:, 1:] != IGNORED
    return [
        (log_probs[own].tolist(), likeliest[own].tolist())
        for log_probs, likeliest, own in zip(scores.log_probs, scores.is_top1, labeled, strict=True)
    ]


def predicting_states(model: PreTrainedModel, rows: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
    """The hidden states ``(n, d)`` that predict the labeled tokens of all rows, and those tokens ``(n,)``."""
    ids, mask, labels = _padded(rows, model.device)
    with torch.inference_mode():
        states = model.base_model(ids, attention_mask=mask).last_hidden_state
    labeled = labels[:, 1:] != IGNORED
    return states[:, :-1][labeled], labels[:, 1:][labeled]


def _padded(rows: Sequence[Encoded], device: torch.device) -> list[Tensor]:
    """Token ids, attention mask and labels of rows, ``(B, L)`` each, padded on the right."""
    longest = max(len(row.input_ids) for row in rows)
    return [
        torch.tensor([values + [fill] * (longest - len(values)) for values in columns], device=device)
        for columns, fill in (
            ([row.input_ids for row in rows], 0),
            ([[1] * len(row.input_ids) for row in rows], 0),
            ([row.labels for row in rows], IGNORED),
        )
    ]


def _batches(rows: Iterable[ScoredRow], size: int) -> Iterator[list[ScoredRow]]:
    waiting = iter(rows)
    while batch := list(islice(waiting, size)):
        yield batch

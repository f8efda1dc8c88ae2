"""Log-probabilities of given tokens that never hold the logits of all of them at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from .autocast import to_autocast_dtype

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
        labels: ``(B, L)``, -100 where no score is asked for.
        shifted: Whether each label is what its own place is to predict. The scores are then ``(B, L)``.
    """
    hidden, targets = (hidden, labels) if shifted else (hidden[:, :-1], labels[:, 1:])
    asked = targets != -100
    # The backward, which runs outside autocast, has to compute the same logits.
    values = _Scores.apply(to_autocast_dtype(hidden[asked]), weight, targets[asked])
    rows = [value.new_zeros(asked.shape).masked_scatter(asked, value) for value in values]
    return TokenScores(*rows)


class _Scores(torch.autograd.Function):
    """The backward computes the logits again: how much each token's gradient counts is only known then."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        weight = weight.to(hidden.dtype)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        normalizers, log_probs, entropy, means = (hidden.new_empty(len(targets), dtype=wide) for _ in range(4))
        top1 = torch.empty_like(targets, dtype=torch.bool)
        for rows in _chunks(len(targets)):
            logits = torch.nn.functional.linear(hidden[rows], weight).to(wide)
            chosen = logits.gather(1, targets[rows, None])[:, 0]
            means[rows] = logits.mean(-1)
            top1[rows] = chosen >= logits.amax(-1)
            normalizers[rows] = logits.logsumexp(-1)
            log_probs[rows] = chosen - normalizers[rows]
            probabilities = (logits - normalizers[rows, None]).exp_()
            entropy[rows] = normalizers[rows] - torch.linalg.vecdot(probabilities, logits)
        ctx.save_for_backward(hidden, weight, targets, normalizers)
        ctx.mark_non_differentiable(entropy, means, top1)
        return log_probs, entropy, means, top1

    @staticmethod
    def backward(ctx: Any, d_log_probs: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, normalizers = ctx.saved_tensors
        need_hidden, need_weight, _ = ctx.needs_input_grad
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_weight = torch.zeros_like(weight, dtype=normalizers.dtype) if need_weight else None
        for rows in _chunks(len(targets)):
            logits = torch.nn.functional.linear(hidden[rows], weight).to(normalizers.dtype)
            d_logits = (logits - normalizers[rows, None]).exp_().neg_()
            d_logits[torch.arange(len(d_logits), device=d_logits.device), targets[rows]] += 1
            d_logits = (d_logits * d_log_probs[rows, None]).to(hidden.dtype)
            if d_hidden is not None:
                d_hidden[rows] = d_logits @ weight
            if d_weight is not None:
                d_weight += d_logits.mT @ hidden[rows]
        return d_hidden, d_weight, None


def _chunks(tokens: int) -> list[slice]:
    return [slice(begin, begin + CHUNK) for begin in range(0, tokens, CHUNK)]

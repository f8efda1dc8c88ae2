"""How the next token is chosen: penalties and biases, the nucleus, and the score of a token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: Sampling temperature; 0 is greedy decoding.
        top_p: Nucleus sampling: only the likeliest tokens with this total probability are sampled from.
        seed: The seed of this sequence's own generator; its tokens do not depend on the rest of the batch. None draws
            a seed from torch's global generator.
        top_k: The number of likeliest tokens to sample from; 0 for all.
        min_p: Only tokens with at least this share of the likeliest token's probability are sampled from.
        repetition_penalty: Divides the positive logits of tokens of the prompt and the text, and multiplies the
            negative ones (arXiv 1909.05858, section 4.1); 1 changes nothing.
        presence_penalty: Subtracted from the logit of every token that the text has.
        frequency_penalty: Subtracted from a token's logit each time that the text has it.
        logit_bias: Added to the logits of these tokens.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    @property
    def changes_logits(self) -> bool:
        """Whether penalties or biases change the logits, in greedy decoding as well."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return penalties != (1.0, 0.0, 0.0) or bool(self.logit_bias)


@dataclass(frozen=True)
class TokenScore:
    """A token's log-probability given its prefix, in nats, and the likeliest tokens there, likeliest first."""

    token: int
    log_prob: float
    top: tuple[tuple[int, float], ...] = ()


def penalized_logits(logits: Tensor, sampling: Sampling, prompt: Sequence[int], ids: Sequence[int]) -> Tensor:
    """The logits of one position after penalties and biases.

    Args:
        logits: ``(V,)``, any float dtype; it is not changed.
        sampling: The penalties and biases.
        prompt: The prompt's token ids.
        ids: The token ids generated so far.

    Returns:
        ``(V,)``, in float32 at least.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
    if sampling.repetition_penalty != 1.0:
        seen = torch.tensor([*prompt, *ids], device=logits.device).unique()
        values, penalty = logits[seen], sampling.repetition_penalty
        logits[seen] = torch.where(values > 0, values / penalty, values * penalty)

    if ids:
        tokens, counts = torch.tensor(ids, device=logits.device).unique(return_counts=True)
        logits[tokens] -= sampling.presence_penalty + sampling.frequency_penalty * counts

    if sampling.logit_bias:
        logits[list(sampling.logit_bias)] += logits.new_tensor(list(sampling.logit_bias.values()))
    return logits


def relative_logits(logits: Tensor, temperature: float) -> Tensor:
    """Log-probabilities at a temperature, up to a constant: 0 for the likeliest token, negative for others.

    Unlike logits divided by a small temperature, they never overflow to infinity at the likeliest token.

    Args:
        logits: ``(..., V)``, any float dtype; computed in float32 at least.
        temperature: Sampling temperature, greater than 0.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # A smaller temperature would be 0 in this dtype.
    return (logits - logits.amax(-1, keepdim=True)) / max(temperature, torch.finfo(logits.dtype).tiny)


def sampling_probabilities(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The tokens to sample from at one position.

    Args:
        logits: ``(V,)``, any float dtype.
        sampling: The temperature, greater than 0, ``top_k``, ``min_p`` and ``top_p``, which apply in this order.

    Returns:
        The probabilities ``(V,)`` of all tokens, likeliest first and 0 for those that are left out, and the tokens
        ``(V,)``. The probabilities are not normalized again.
    """
    probabilities, tokens = relative_logits(logits, sampling.temperature).softmax(-1).sort(descending=True)
    outside = probabilities < sampling.min_p * probabilities[0]
    if sampling.top_k:
        outside[sampling.top_k :] = True

    if sampling.top_k or sampling.min_p:
        probabilities = probabilities.masked_fill(outside, 0.0)
        probabilities = probabilities / probabilities.sum()
    outside |= probabilities.cumsum(-1) - probabilities >= sampling.top_p
    outside[0] = False  # the likeliest token stays in, also where top_p is 0 in this dtype
    return probabilities.masked_fill(outside, 0.0), tokens


def token_score(log_probs: Tensor, token: int, top: int) -> TokenScore:
    """The score of a token at one position.

    Args:
        log_probs: ``(V,)``, the log-probabilities at that position.
        token: The token at that position.
        top: How many of the likeliest tokens to include.
    """
    best = log_probs.topk(top)
    return TokenScore(
        token, float(log_probs[token]), tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    )

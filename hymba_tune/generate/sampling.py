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


def sampling_rows(samplings: Sequence[Sampling]) -> Tensor:
    """How the next tokens of several texts are chosen, as a tensor on the CPU.

    Returns:
        ``(S, 7)`` float64: temperature, top_p, top_k, min_p, and the repetition, presence and frequency penalties.
    """
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    return torch.tensor([[getattr(one, name) for name in names] for one in samplings], dtype=torch.float64)


def penalized_logits(logits: Tensor, rows: Tensor, in_prompt: Tensor, counts: Tensor, bias: Tensor) -> Tensor:
    """The logits of the next tokens after penalties and biases.

    Args:
        logits: ``(S, V)``, any float dtype; it is not changed.
        rows: ``(S, 7)``, of `sampling_rows`, in the dtype of the result.
        in_prompt: ``(S, V)`` bool, the tokens of each prompt.
        counts: ``(S, V)``, how often each text has each token.
        bias: ``(S, V)``, what is added to the logits.

    Returns:
        ``(S, V)``, in float32 at least.
    """
    repetition, presence, frequency = rows[:, 4:].unsqueeze(-1).unbind(1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    in_text = counts > 0
    repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
    logits = torch.where(in_prompt | in_text, repeated, logits)
    return logits - torch.where(in_text, presence + frequency * counts, 0.0) + bias


def relative_logits(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """Log-probabilities at a temperature, up to a constant: 0 for the likeliest token, negative for others.

    Unlike logits divided by a small temperature, they never overflow to infinity at the likeliest token.

    Args:
        logits: ``(..., V)``, any float dtype; computed in float32 at least.
        temperature: Sampling temperature, one for all or ``(..., 1)``.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    least = torch.finfo(logits.dtype).tiny  # a smaller temperature would be 0 in this dtype
    temperature = temperature.clamp(min=least) if isinstance(temperature, Tensor) else max(temperature, least)
    return (logits - logits.amax(-1, keepdim=True)) / temperature


def sampling_probabilities(logits: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens to sample from.

    Args:
        logits: ``(S, V)``, any float dtype.
        rows: ``(S, 7)``, of `sampling_rows`, in the dtype of the result. First ``top_k`` applies, then ``min_p``, then
            ``top_p``.

    Returns:
        The probabilities ``(S, V)`` of all tokens, likeliest first and 0 for those that are left out, and the tokens
        ``(S, V)``. The probabilities are not normalized again.
    """
    temperature, top_p, top_k, min_p = rows[:, :4].unsqueeze(-1).unbind(1)
    probabilities, tokens = relative_logits(logits, temperature).softmax(-1).sort(descending=True)
    places = torch.arange(logits.shape[-1], device=logits.device)
    outside = (probabilities < min_p * probabilities[:, :1]) | ((places >= top_k) & (top_k > 0))

    kept = probabilities.masked_fill(outside, 0.0)
    restricted = (top_k > 0) | (min_p > 0)
    probabilities = torch.where(restricted, kept / kept.sum(-1, keepdim=True), probabilities)
    outside |= probabilities.cumsum(-1) - probabilities >= top_p
    outside[:, 0].fill_(False)  # the likeliest token stays in, also where top_p is 0 in this dtype
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

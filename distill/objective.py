"""What a step of distillation minimizes, from hidden states: (1 - alpha) · CE + alpha · KD, summed over tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hymba_tune.data import IGNORED
from hymba_tune.distill.chunks import Head, chunk_rows, chunked_loss, log_likelihood
from hymba_tune.distill.losses import alm, cross_entropy, mix, span_sums, sparse_projection_kl
from hymba_tune.distill.targets import Targets


@dataclass(frozen=True, slots=True)
class TokenTerm:
    """What the teacher says of some tokens one by one.

    Attributes:
        at: ``(N,)`` int64, ascending: which tokens.
        loss: From the student's logits ``(n, V)`` of the tokens ``at[part]``, and the part, to their losses ``(n,)``.
        weight: Of the term in KD.
        vocabulary: Columns of the teacher's logits that ``loss`` holds beside the student's; 0 for none.
    """

    at: Tensor
    loss: Callable[[Tensor, slice], Tensor]
    weight: float = 1.0
    vocabulary: int = 0


@dataclass(frozen=True, slots=True)
class SpanTerm:
    """What the teacher says of spans: how likely they are.

    Attributes:
        spans: ``(S, 2)`` int64: ``[begin, end)`` of tokens that are all learned.
        log_likelihoods: ``(S,)``: the teacher's, nats.
        tau: Of `alm`.
        weight: Of the term in KD.
    """

    spans: Tensor
    log_likelihoods: Tensor
    tau: float
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Losses:
    """Sums over the learned tokens of a batch.

    Attributes:
        total: What is minimized, with its gradient.
        tokens: How many learned tokens there are.
        parts: Each loss alone, for the log: ``ce`` of all tokens, and the teacher's by name.
    """

    total: Tensor
    tokens: int
    parts: dict[str, Tensor] = field(default_factory=dict)


def sparse_term(targets: Targets, *, temperature: float = 1.0, weight: float = 1.0) -> TokenTerm:
    """The projection's term, or that of one tokenizer's likeliest tokens."""

    def loss(logits: Tensor, part: slice) -> Tensor:
        top = type(targets.top)(*(values[part] for values in targets.top))
        return sparse_projection_kl(logits, top, temperature=temperature)

    return TokenTerm(targets.at, loss, weight)


def span_term(targets: Targets, *, tau: float, weight: float = 1.0, only_without_target: bool = False) -> SpanTerm:
    """The term of chunk likelihoods.

    Args:
        targets: Of a batch.
        tau: Of `alm`.
        weight: Of the term.
        only_without_target: Only spans with a token that the projection has no target for.
    """
    spans, likelihoods = targets.spans, targets.span_log_likelihoods
    if only_without_target:
        told = torch.searchsorted(targets.at, spans)
        kept = told[:, 1] - told[:, 0] < spans[:, 1] - spans[:, 0]
        spans, likelihoods = spans[kept], likelihoods[kept]
    return SpanTerm(spans, likelihoods, tau, weight)


def distillation_loss(
    student: Head,
    labels: Tensor,
    *,
    alpha: float,
    tokens: TokenTerm | None = None,
    spans: SpanTerm | None = None,
) -> Losses:
    """The loss of a batch.

    A learned token of which the teacher says nothing takes cross-entropy for KD, unless a span speaks for it.

    Args:
        student: Hidden states ``(T, d)`` and the head; ``hidden[j]`` predicts ``labels[j]``.
        labels: ``(T,)`` int64; -100 where nothing is learned.
        alpha: The teacher's share, in ``[0, 1]``; 0 is cross-entropy alone.
        tokens: The teacher's losses of tokens, if any.
        spans: Of spans, if any.
    """
    learned = (labels != IGNORED).nonzero().squeeze(1)
    student, targets = Head(student.hidden[learned], student.weight), labels[learned]
    vocabulary = student.weight.shape[0]
    parts = {"ce": torch.zeros((), dtype=torch.float64, device=labels.device)}
    at = learned[:0] if tokens is None else torch.searchsorted(learned, tokens.at)
    bounds = learned.new_zeros(0, 2) if spans is None else torch.searchsorted(learned, spans.spans)
    spoken_for = _covered(bounds, len(learned))
    if tokens is not None:
        parts["kd"] = torch.zeros_like(parts["ce"])

    def token_loss(logits: Tensor, rows: slice) -> Tensor:
        data = cross_entropy(logits, targets[rows])
        parts["ce"] += data.detach().sum()
        begin, end = torch.searchsorted(at, at.new_tensor([rows.start, rows.start + len(logits)])).tolist()
        here, said = at[begin:end] - rows.start, ~spoken_for[rows]
        taught = torch.where(said, data, 0)
        if tokens is not None and end > begin:
            values = tokens.loss(logits[here], slice(begin, end))
            parts["kd"] += values.detach().sum()
            taught = taught.index_copy(0, here, tokens.weight * values.to(taught.dtype))
        return mix(data, taught, alpha=alpha)

    rows = chunk_rows(vocabulary, tokens.vocabulary if tokens is not None else 0)
    total = chunked_loss(student, token_loss, rows)
    if spans is not None and len(bounds):
        found = log_likelihood(student, targets, rows)
        values = alm(span_sums(found, bounds[:, 0], bounds[:, 1]), spans.log_likelihoods, tau=spans.tau).sum()
        parts["alm"] = values.detach()
        total = total + alpha * spans.weight * values
    return Losses(total, len(learned), parts)


def _covered(spans: Tensor, tokens: int) -> Tensor:
    """``(tokens,)`` bool: which tokens lie in a span."""
    edges = spans.new_zeros(tokens + 1)
    ones = torch.ones_like(spans[:, 0])
    edges.index_add_(0, spans[:, 0], ones).index_add_(0, spans[:, 1], -ones)
    return edges.cumsum(0)[:-1] > 0

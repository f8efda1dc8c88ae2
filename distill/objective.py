"""The distillation loss from hidden states: (1 - alpha) · CE + alpha · KD, summed over tokens."""

from __future__ import annotations

from bisect import bisect_left
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
    """The teacher's loss of single tokens.

    Attributes:
        at: ``(N,)`` int64, ascending: the positions of the tokens.
        loss: Maps the student's logits ``(n, V)`` of the tokens ``at[part]``, and the part, to their losses ``(n,)``.
        weight: The weight of the term in KD.
        vocabulary: The columns of the teacher's logits that ``loss`` holds in addition to the student's; 0 for none.
    """

    at: Tensor
    loss: Callable[[Tensor, slice], Tensor]
    weight: float = 1.0
    vocabulary: int = 0


@dataclass(frozen=True, slots=True)
class SpanTerm:
    """The teacher's likelihoods of spans.

    Attributes:
        spans: ``(S, 2)`` int64: ``[begin, end)`` of tokens that all have a loss.
        log_likelihoods: ``(S,)``: the teacher's log-likelihoods, nats.
        tau: The temperature of `alm`.
        weight: The weight of the term in KD.
    """

    spans: Tensor
    log_likelihoods: Tensor
    tau: float
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Losses:
    """Sums of losses over the learned tokens of a batch.

    Attributes:
        total: The loss, with its gradient.
        tokens: The number of learned tokens.
        parts: Each loss on its own, for the log: ``ce`` of all tokens, and the teacher's losses by name.
    """

    total: Tensor
    tokens: int
    parts: dict[str, Tensor] = field(default_factory=dict)


def sparse_term(targets: Targets, *, temperature: float = 1.0, weight: float = 1.0) -> TokenTerm:
    """Return the term of sparse targets: of the projection, or of the teacher's top-k with one tokenizer."""

    def loss(logits: Tensor, part: slice) -> Tensor:
        top = type(targets.top)(*(values[part] for values in targets.top))
        return sparse_projection_kl(logits, top, temperature=temperature)

    return TokenTerm(targets.at, loss, weight)


def span_term(targets: Targets, *, tau: float, weight: float = 1.0, only_without_target: bool = False) -> SpanTerm:
    """Return the term of span likelihoods.

    Args:
        targets: The targets of a batch.
        tau: The temperature of `alm`.
        weight: The weight of the term in KD.
        only_without_target: Whether to leave out spans whose tokens all have a projected target.
    """
    spans, likelihoods = targets.spans, targets.span_log_likelihoods
    if only_without_target:
        bounds = torch.searchsorted(targets.at, spans)
        incomplete = bounds[:, 1] - bounds[:, 0] < spans[:, 1] - spans[:, 0]
        spans, likelihoods = spans[incomplete], likelihoods[incomplete]
    return SpanTerm(spans, likelihoods, tau, weight)


def distillation_loss(
    student: Head,
    labels: Tensor,
    *,
    alpha: float,
    tokens: TokenTerm | None = None,
    spans: SpanTerm | None = None,
) -> Losses:
    """Compute the loss of a batch.

    For a learned token without a teacher's term, KD is cross-entropy, unless a span covers the token.

    Args:
        student: Hidden states ``(T, d)`` and the output layer; ``hidden[j]`` predicts ``labels[j]``.
        labels: ``(T,)`` int64; -100 for tokens without a loss.
        alpha: The teacher's share, in ``[0, 1]``; 0 is cross-entropy only.
        tokens: The teacher's term of single tokens, if any.
        spans: The teacher's term of spans, if any.
    """
    learned = (labels != IGNORED).nonzero().squeeze(1)
    student, targets = Head(student.hidden[learned], student.weight), labels[learned]
    vocabulary = student.weight.shape[0]
    parts = {"ce": torch.zeros((), dtype=torch.float64, device=labels.device)}
    at = learned[:0] if tokens is None else torch.searchsorted(learned, tokens.at)
    bounds = learned.new_zeros(0, 2) if spans is None else torch.searchsorted(learned, spans.spans)
    in_span = _covered(bounds, len(learned))
    if tokens is not None:
        parts["kd"] = torch.zeros_like(parts["ce"])

    places = at.tolist()  # a GPU is waited for here, and not for each chunk

    def token_loss(logits: Tensor, rows: slice) -> Tensor:
        data = cross_entropy(logits, targets[rows])
        parts["ce"] += data.detach().sum()
        begin, end = bisect_left(places, rows.start), bisect_left(places, rows.start + len(logits))
        here = at[begin:end] - rows.start
        taught = torch.where(in_span[rows], 0, data)
        if tokens is not None and end > begin:
            values = tokens.loss(logits[here], slice(begin, end))
            parts["kd"] += values.detach().sum()
            taught = taught.index_copy(0, here, tokens.weight * values.to(taught.dtype))
        return mix(data, taught, alpha=alpha)

    rows = chunk_rows(vocabulary, tokens.vocabulary if tokens is not None else 0, device=labels.device)
    total = chunked_loss(student, token_loss, rows)
    if spans is not None and len(bounds):
        own = log_likelihood(student, targets, rows)
        values = alm(span_sums(own, bounds[:, 0], bounds[:, 1]), spans.log_likelihoods, tau=spans.tau).sum()
        parts["alm"] = values.detach()
        total = total + alpha * spans.weight * values
    return Losses(total, len(learned), parts)


def _covered(spans: Tensor, tokens: int) -> Tensor:
    """Return ``(tokens,)`` bool: whether each token is in a span."""
    edges = spans.new_zeros(tokens + 1)
    ones = torch.ones_like(spans[:, 0])
    edges.index_add_(0, spans[:, 0], ones).index_add_(0, spans[:, 1], -ones)
    return edges.cumsum(0)[:-1] > 0

"""The teacher's next-token probabilities as a target over the student's vocabulary.

For the student's next token, which begins at a byte of the answer: t is the teacher's token there, u the bytes of it
that come before (none at a shared boundary), p its probabilities; t' is the teacher's token before, p' its
probabilities, v = bytes(t') + u. The mass of the student's piece s is

    m(s) = p'(t') · Σ_t p(t) · A_u[t, s]  +  Σ_{t goes on after v} p'(t) · [the piece of t after v is s]

A_u[t, s], for u of some bytes, says whether the student has a boundary exactly after u in t and s is the piece there;
for none, it is how often t begins with s: once alone, and as often as the user's texts have it. The second sum gives
back the tokens that would have gone on where t' ended. Tokens that end exactly where the student's next piece begins
do not say which: p'(t') · p(bytes = u) + p'(bytes = v), for u of some bytes, is the bucket, one outcome that stands
for every piece outside the support. Mass and bucket together are made to sum to one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hymba_tune.distill.alignment import Alignment, Indices
from hymba_tune.distill.chunks import Head, expand
from hymba_tune.distill.tables import NOWHERE, FirstPieces, Tables

ROWS = 64
"""Of the teacher's outputs, how many are projected at a time: a copy of them is held."""
FLOOR = 1e-6
"""Mass below which a position has no target: there is nothing left but rounding."""


@dataclass(frozen=True, slots=True)
class Places:
    """Where some of the student's next tokens stand among the teacher's; N of them, all int64 or bool.

    Attributes:
        now: ``(N,)``: row of the teacher's outputs that predicts the token there.
        before: ``(N,)``: row that predicted the token before it; -1 at an answer's first, which has no second cover.
        previous: ``(N,)``: the token before.
        inside: ``(N,)``: node of the bytes already spelled; 0 for none.
        beyond: ``(N,)``: node of the token before and these; -1 where no token goes on so.
        crossing: ``(N,)``: whether the student's token goes on into the teacher's next.
        piece: ``(N,)``: the student's token.
    """

    now: Tensor
    before: Tensor
    previous: Tensor
    inside: Tensor
    beyond: Tensor
    crossing: Tensor
    piece: Tensor

    def __len__(self) -> int:
        return len(self.now)

    def __getitem__(self, rows: slice | Tensor) -> Self:
        return type(self)(*(getattr(self, field.name)[rows] for field in fields(self)))

    def to(self, device: torch.device) -> Self:
        """The same on another device."""
        return type(self)(*(getattr(self, field.name).to(device) for field in fields(self)))


def find_places(row: Alignment, tables: Tables) -> Places:
    """The places of an aligned row, its teacher's outputs counted from the row's first token."""
    teacher = np.array(row.teacher_ids, np.int64)
    now, previous = teacher[row.teacher], teacher[row.teacher - 1]
    whole = tables.whole(previous)
    # An answer's first token was not chosen against a longer one before it: the template gives that.
    before = np.where(row.first | (row.teacher < 2), -1, row.teacher - 2)
    columns = (
        row.teacher - 1,
        before,
        previous,
        tables.prefix(now, row.spelled),
        tables.walk(whole, now, row.spelled),
        row.crossing,
        np.array(row.student_ids, np.int64)[row.student],
    )
    return Places(*map(torch.from_numpy, columns))


class SparseTarget(NamedTuple):
    """The likeliest pieces of a `ProjectedTarget`; all others are in the bucket.

    Attributes:
        pieces: ``(N, k)`` int64, distinct in each row.
        log_probs: ``(N, k)``, nats; -inf for pieces without mass, which belong to the bucket's.
        bucket: ``(N,)``: log-probability of any other piece.
    """

    pieces: Tensor
    log_probs: Tensor
    bucket: Tensor


@dataclass(frozen=True, slots=True)
class ProjectedTarget:
    """What the student is to predict at N places.

    Attributes:
        probs: ``(N, V)``, over the student's vocabulary; with the bucket they sum to 1.
        bucket: ``(N,)``: of any piece outside the support, which is where ``probs`` is positive.
        mass: ``(N,)``: what they summed to before: how much of the teacher's probability the place keeps.
        known: ``(N,)`` bool: whether there is a target: the mass is above `FLOOR`, and a piece that goes on into the
            teacher's next token has some of it. Elsewhere ``probs`` and ``bucket`` mean nothing.
        kept: ``(N,)``: how much of p finds a piece or the bucket, whatever was before: at a shared boundary what lies
            on tokens that the student can write, within a token what goes on as that token has begun.
    """

    probs: Tensor
    bucket: Tensor
    mass: Tensor
    known: Tensor
    kept: Tensor

    def top(self, k: int) -> SparseTarget:
        """Keep the k likeliest pieces; the mass of the others joins the bucket."""
        values, pieces = self.probs.topk(min(k, self.probs.shape[1]), dim=-1)
        tail = self.probs.scatter(1, pieces, 0).sum(-1)
        return SparseTarget(pieces, values.log(), (self.bucket + tail).log())


class Projection:
    """The map from the teacher's probabilities to the student's target.

    Args:
        tables: Of the pair.
        seen: First pieces in the user's own texts; without them only those of tokens alone are known.
        vocabulary: Columns of the target: the rows of the student's head.
        device: Where the probabilities will be.
        dtype: In which they will be computed.
    """

    def __init__(
        self,
        tables: Tables,
        seen: FirstPieces | None = None,
        *,
        vocabulary: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.vocabulary, self.device = vocabulary, torch.device(device)

        def moved(column: NDArray[Any]) -> Tensor:
            return torch.from_numpy(column).to(device)

        tokens, pieces, shares = _first_pieces(tables, seen)
        one = np.bincount(tokens)[tokens] == 1
        begins = np.full(len(tables.first), vocabulary)
        begins[tokens[one]] = pieces[one]
        self._begins = moved(begins)  # the piece of each token that has one; else a column that is thrown away
        self._several_token, self._several_piece = moved(tokens[~one]), moved(pieces[~one])
        self._several_share = moved(shares[~one]).to(dtype)
        self._after_start, self._exact_start = moved(tables.after_start), moved(tables.exact_start)
        self._after_token, self._after_piece = moved(tables.after_token), moved(tables.after_piece)
        self._exact_token = moved(tables.exact_token)

    @torch.no_grad()
    def __call__(self, probs: Tensor, places: Places, cut: Tensor | None = None) -> ProjectedTarget:
        """Project.

        Args:
            probs: ``(R, V)``: the teacher's probabilities, a row an output, in the dtype this was made for. All
                columns of its vocabulary; zero where a server did not tell.
            places: With ``now`` and ``before`` counted in these rows.
            cut: ``(R,)``: probability that was not told, which joins the bucket.

        Returns:
            The target, in the same dtype.
        """
        covered = places.before >= 0
        earlier = probs[places.before.clamp(min=0)[:, None], places.previous[:, None]].squeeze(1)
        earlier = torch.where(covered, earlier, 1)
        shared, inside = (places.inside == 0).nonzero().squeeze(1), places.inside.nonzero().squeeze(1)
        mass = probs.new_zeros(len(places), self.vocabulary)
        for part in shared.split(ROWS):
            mass[part] = self._begin(probs[places.now[part]]).mul_(earlier[part, None])
        bucket = torch.zeros_like(earlier) if cut is None else earlier * cut[places.now]

        rows, tokens, pieces = self._entries(inside, places.inside[inside])
        _add(mass, rows, pieces, probs[places.now[rows], tokens] * earlier[rows])
        rows, tokens = self._exact(inside, places.inside[inside])
        bucket.index_add_(0, rows, probs[places.now[rows], tokens] * earlier[rows])

        kept = (mass.sum(-1) + bucket) / earlier.clamp(min=torch.finfo(mass.dtype).tiny)
        beyond = (covered & (places.beyond != NOWHERE)).nonzero().squeeze(1)
        rows, tokens, pieces = self._entries(beyond, places.beyond[beyond])
        _add(mass, rows, pieces, probs[places.before[rows], tokens])
        both = beyond[places.inside[beyond] > 0]
        rows, tokens = self._exact(both, places.beyond[both])
        bucket.index_add_(0, rows, probs[places.before[rows], tokens])
        return _normalized(mass, bucket, kept, places)

    @torch.no_grad()
    def from_outputs(
        self, probabilities: Callable[[Tensor], tuple[Tensor, Tensor | None]], places: Places
    ) -> ProjectedTarget:
        """Project at some places, asking for each of the teacher's outputs there and before once.

        Args:
            probabilities: From rows of outputs, ascending, to their ``probs`` and ``cut``.
            places: A chunk of them.
        """
        rows = torch.cat([places.now, places.before[places.before >= 0]]).unique()
        before = torch.where(places.before < 0, -1, torch.searchsorted(rows, places.before))
        probs, cut = probabilities(rows)
        return self(probs, replace(places, now=torch.searchsorted(rows, places.now), before=before), cut)

    def from_head(self, teacher: Head, places: Places, *, temperature: float = 1.0) -> ProjectedTarget:
        """Project at some places, from the teacher's hidden states there and before: one softmax an output.

        Args:
            teacher: Its hidden states, in which ``places.now`` and ``places.before`` count.
            places: A chunk of them.
            temperature: Of the teacher's probabilities.
        """
        return self.from_outputs(lambda rows: ((teacher.logits(rows) / temperature).softmax(-1), None), places)

    def _begin(self, probs: Tensor) -> Tensor:
        """From the probabilities ``(n, V)`` of the teacher's tokens to those of the pieces that they begin with."""
        mass = probs.new_zeros(len(probs), self.vocabulary + 1)
        mass.scatter_add_(1, self._begins.expand_as(probs), probs)
        several = probs.index_select(1, self._several_token).mul_(self._several_share)
        mass.scatter_add_(1, self._several_piece.expand_as(several), several)
        return mass[:, : self.vocabulary]

    def _entries(self, rows: Tensor, nodes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of rows with their nodes: each entry's row, token and piece."""
        owner, at = expand(self._after_start[nodes].long(), self._after_start[nodes + 1].long())
        return rows[owner], self._after_token[at].long(), self._after_piece[at].long()

    def _exact(self, rows: Tensor, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """Of rows with their nodes: each token's row and the token."""
        owner, at = expand(self._exact_start[nodes].long(), self._exact_start[nodes + 1].long())
        return rows[owner], self._exact_token[at].long()


def _first_pieces(tables: Tables, seen: FirstPieces | None) -> tuple[Indices, Indices, NDArray[np.float64]]:
    """A_u for an empty u: of each entry its token, ascending, its piece, and the share of that token's mass.

    A token's shares sum to 1; one without a piece has no entry.
    """
    alone = np.flatnonzero(tables.first >= 0)
    tokens, pieces, counts = alone, tables.first[alone].astype(np.int64), np.ones(len(alone))
    if seen is not None:
        tokens, pieces = np.concatenate([tokens, seen.tokens]), np.concatenate([pieces, seen.pieces])
        counts = np.concatenate([counts, seen.counts])
    shares = counts / np.bincount(tokens, counts)[tokens]
    pairs, where = np.unique(tokens << 32 | pieces, return_inverse=True)
    return pairs >> 32, pairs & 0xFFFFFFFF, np.bincount(where, shares).astype(np.float64)


def _add(mass: Tensor, rows: Tensor, pieces: Tensor, values: Tensor) -> None:
    mass.view(-1).index_add_(0, rows * mass.shape[1] + pieces, values)


def _normalized(mass: Tensor, bucket: Tensor, kept: Tensor, places: Places) -> ProjectedTarget:
    """Mass and bucket as probabilities. A bucket beside a full support stands for nothing, and is left out."""
    bucket = bucket.masked_fill(mass.amin(-1) > 0, 0)
    total = mass.sum(-1) + bucket
    reached = mass.gather(1, places.piece[:, None]).squeeze(1) > 0
    known = (total > FLOOR) & (reached | ~places.crossing)
    scale = total.clamp(min=torch.finfo(total.dtype).tiny)
    return ProjectedTarget(mass.div_(scale[:, None]), bucket / scale, total, known, kept)

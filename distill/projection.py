"""The teacher's next-token probabilities as a target over the student's vocabulary.

Consider one of the student's next tokens, which begins at some byte of the answer. Let t be the teacher's token at that
byte, u the bytes of t before it (none at a shared boundary), and p the teacher's probabilities of t. Let t' be the
teacher's token before t, p' the probabilities of t', and v = bytes(t') + u. The mass of the student's token s is

    m(s) = p'(t') · Σ_t p(t) · A_u[t, s]  +  Σ_{t continues v} p'(t) · [the student's token of t after v is s]

If u is not empty, A_u[t, s] is 1 where the student has a boundary exactly after u in t and s is its token there, else
0. If u is empty, it is the frequency with which t begins with s: counted once for t on its own, and once for each
occurrence in the user's texts. The second sum returns the mass of the longer tokens that were possible where t' ended.

Teacher tokens that end exactly where the student's next token begins do not say what that token is. Their mass,
p'(t') · p(bytes = u) + p'(bytes = v) for a u that is not empty, is the rest mass: one outcome that covers every token
outside the support. The mass of tokens that the student cannot write belongs to the rest mass too. Mass and rest mass
are scaled to sum to 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hymba_tune.distill.alignment import Alignment, Indices
from hymba_tune.distill.chunks import Head, expand
from hymba_tune.distill.tables import NOWHERE, FirstTokens, Tables

FLOOR = 1e-6
"""Mass, relative to p'(t'), below which a position has no target, because it would be rounding error only."""


@dataclass(frozen=True, slots=True)
class Places:
    """The positions of N of the student's next tokens among the teacher's tokens; all tensors are int64 or bool.

    Attributes:
        now: ``(N,)``: the row of the teacher's outputs that predicts the teacher's token at this position.
        before: ``(N,)``: the row that predicted the teacher's token before that one; -1 for the first token of an
            answer.
        previous: ``(N,)``: the teacher's token before that one.
        inside: ``(N,)``: the node of the bytes of the teacher's token before this position; 0 for none.
        beyond: ``(N,)``: the node of the bytes of ``previous`` and then these; -1 where no teacher token begins so.
        crossing: ``(N,)``: whether the student's token continues into the teacher's next token.
        student_token: ``(N,)``: the student's token.
    """

    now: Tensor
    before: Tensor
    previous: Tensor
    inside: Tensor
    beyond: Tensor
    crossing: Tensor
    student_token: Tensor

    def __len__(self) -> int:
        return len(self.now)

    def __getitem__(self, rows: slice | Tensor) -> Self:
        return type(self)(*(getattr(self, field.name)[rows] for field in fields(self)))

    @classmethod
    def joined(cls, rows: Sequence[Self], offsets: Sequence[int]) -> Self:
        """Concatenate the places of several rows.

        Args:
            rows: The places of each row.
            offsets: For each row, the index of its first row of outputs.
        """
        joined = cls(*(torch.cat([getattr(row, field.name) for row in rows]) for field in fields(cls)))
        moved = torch.tensor(offsets).repeat_interleave(torch.tensor([len(row) for row in rows]))
        return replace(joined, now=joined.now + moved, before=torch.where(joined.before < 0, -1, joined.before + moved))

    def to(self, device: torch.device) -> Self:
        """Return the same places on another device."""
        return type(self)(*(getattr(self, field.name).to(device) for field in fields(self)))


def find_places(row: Alignment, tables: Tables) -> Places:
    """Find the places of an aligned row. Rows of the teacher's outputs are counted from the row's first token."""
    teacher = np.array(row.teacher_ids, np.int64)
    now, previous = teacher[row.teacher], teacher[row.teacher - 1]
    whole = tables.whole(previous)
    # The chat template gives the token before an answer, so no longer token was possible in its place.
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
    """The most likely tokens of a `ProjectedTarget`; the mass of all other tokens is one value.

    Attributes:
        student_tokens: ``(N, k)`` int64, distinct in each row.
        log_probs: ``(N, k)``, nats; -inf for tokens without mass, which do not belong to the support.
        rest_mass: ``(N,)``: the log-probability of all tokens outside the support, nats.
    """

    student_tokens: Tensor
    log_probs: Tensor
    rest_mass: Tensor


@dataclass(frozen=True, slots=True)
class ProjectedTarget:
    """The target distributions of the student at N places.

    Attributes:
        probs: ``(N, V)``, over the student's vocabulary; with the rest mass they sum to 1.
        rest_mass: ``(N,)``: the probability of all tokens outside the support, which is where ``probs`` is positive.
        known: ``(N,)`` bool: whether there is a target. The sum before scaling, relative to the probability of the
            teacher's token before, must be above `FLOOR`, and a student token that continues into the teacher's next
            token must have some of it. Elsewhere ``probs`` and ``rest_mass`` are meaningless.
        coverage: ``(N,)``: the share of p on tokens that the student can write (within a token, of those that continue
            the bytes so far) or outside a server's top-k, whatever came before.
    """

    probs: Tensor
    rest_mass: Tensor
    known: Tensor
    coverage: Tensor

    def top(self, k: int) -> SparseTarget:
        """Keep the k most likely tokens; the mass of the others is added to the rest mass."""
        values, student_tokens = self.probs.topk(min(k, self.probs.shape[1]), dim=-1)
        tail = self.probs.scatter(1, student_tokens, 0).sum(-1)
        return SparseTarget(student_tokens, values.log(), (self.rest_mass + tail).log())


class Projection:
    """The map from the teacher's probabilities to the student's target.

    Args:
        tables: The tables of the pair.
        seen: The first student tokens in the user's texts; None uses the segmentation of single tokens only.
        vocabulary: The columns of the target, which are the rows of the student's output layer.
        device: The device of the probabilities.
        dtype: The dtype of the probabilities.
    """

    def __init__(
        self,
        tables: Tables,
        seen: FirstTokens | None = None,
        *,
        vocabulary: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.vocabulary, self.device = vocabulary, torch.device(device)

        def moved(column: NDArray[Any]) -> Tensor:
            return torch.from_numpy(column).to(device)

        tokens, student_tokens, shares = _first_tokens(tables, seen)

        # Most teacher tokens have one first student token: one scatter over the vocabulary maps all of these. The few
        # with several get a smaller scatter with shares, and a column that is dropped in the first one.
        one = np.bincount(tokens)[tokens] == 1
        begins = np.full(len(tables.first), vocabulary)  # the column of tokens that the student cannot write
        begins[tokens] = vocabulary + 1
        begins[tokens[one]] = student_tokens[one]
        self._begins = moved(begins)
        self._several_token = moved(tokens[~one])
        self._several_student_token = moved(student_tokens[~one])
        self._several_share = moved(shares[~one]).to(dtype)

        self._after_start = moved(tables.after_start)
        self._after_token = moved(tables.after_token)
        following = tables.after_student_token
        self._after_student_token = moved(np.where(following == NOWHERE, vocabulary, following))
        self._exact_start = moved(tables.exact_start)
        self._exact_token = moved(tables.exact_token)

    @torch.no_grad()
    def __call__(self, probs: Tensor, places: Places, cut: Tensor | None = None) -> ProjectedTarget:
        """Project the teacher's probabilities.

        Args:
            probs: ``(R, V)``: one row for each of the teacher's outputs, in this object's dtype, with all columns of
                the teacher's vocabulary; zero outside a server's top-k.
            places: The places, whose ``now`` and ``before`` index these rows.
            cut: ``(R,)``: the probability mass outside a server's top-k, which is added to the rest mass.

        Returns:
            The target, in the same dtype.
        """
        covered = places.before >= 0
        earlier = probs[places.before.clamp(min=0)[:, None], places.previous[:, None]].squeeze(1)
        earlier = torch.where(covered, earlier, 1)

        # At shared boundaries every teacher token counts by its first student token.
        mass = self._begin(probs)[places.now].mul_((places.inside == 0)[:, None])
        rest_mass = torch.zeros_like(earlier) if cut is None else cut[places.now]

        # Within a token only those count that continue its bytes so far. Tokens that end here do not say what follows.
        inside = places.inside.nonzero().squeeze(1)
        rows, tokens, student_tokens = self._entries(inside, places.inside[inside])
        _add(mass, rows, student_tokens, probs[places.now[rows], tokens])
        rows, tokens = self._exact(inside, places.inside[inside])
        rest_mass = rest_mass.index_add(0, rows, probs[places.now[rows], tokens])
        coverage = mass[:, :-1].sum(-1) + rest_mass

        # Longer tokens than the one that ended here were possible too: their mass returns to what they continue with.
        beyond = (covered & (places.beyond != NOWHERE)).nonzero().squeeze(1)
        rows, tokens, student_tokens = self._entries(beyond, places.beyond[beyond])
        longer = probs[places.before[rows], tokens]
        # At a shared boundary the token that ends here is the actual one, whose mass the first sum has distributed.
        both = beyond[places.inside[beyond] > 0]
        exact_rows, tokens = self._exact(both, places.beyond[both])
        exact = probs[places.before[exact_rows], tokens]

        # Both sums are divided by the larger of their factors: a product with a tiny p'(t') would be rounding error.
        returned = torch.zeros_like(earlier).index_add_(0, rows, longer).index_add_(0, exact_rows, exact)
        larger = torch.maximum(earlier, returned)
        impossible = larger == 0  # in float32; then only what comes now counts
        larger = larger.masked_fill(impossible, 1)
        share = (earlier / larger).masked_fill(impossible, 1)
        mass.mul_(share[:, None])
        _add(mass, rows, student_tokens, longer / larger[rows])
        rest_mass = (rest_mass * share).index_add_(0, exact_rows, exact / larger[exact_rows])
        return _normalized(mass, rest_mass, share, coverage, places)

    @torch.no_grad()
    def from_outputs(
        self, probabilities: Callable[[Tensor], tuple[Tensor, Tensor | None]], places: Places
    ) -> ProjectedTarget:
        """Project at some places, and compute each of the outputs that they need once.

        Args:
            probabilities: A function from rows of outputs, ascending, to their ``probs`` and ``cut``.
            places: A chunk of places.
        """
        rows = torch.cat([places.now, places.before[places.before >= 0]]).unique()
        before = torch.where(places.before < 0, -1, torch.searchsorted(rows, places.before))
        probs, cut = probabilities(rows)
        return self(probs, replace(places, now=torch.searchsorted(rows, places.now), before=before), cut)

    def from_head(self, teacher: Head, places: Places, *, temperature: float = 1.0) -> ProjectedTarget:
        """Project at some places from the teacher's hidden states, with one softmax for each output.

        Args:
            teacher: The hidden states that ``places.now`` and ``places.before`` index, and the output layer.
            places: A chunk of places.
            temperature: The temperature of the teacher's probabilities.
        """
        return self.from_outputs(lambda rows: ((teacher.logits(rows) / temperature).softmax(-1), None), places)

    def _begin(self, probs: Tensor) -> Tensor:
        """Turn probabilities ``(n, V)`` of the teacher's tokens into those of the student tokens they begin with.

        A last column has those of the tokens that the student cannot write.
        """
        mass = probs.new_zeros(len(probs), self.vocabulary + 2)
        mass.scatter_add_(1, self._begins.expand_as(probs), probs)
        several = probs.index_select(1, self._several_token).mul_(self._several_share)
        mass.scatter_add_(1, self._several_student_token.expand_as(several), several)
        return mass[:, :-1]

    def _entries(self, rows: Tensor, nodes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the row, teacher token and student token of each table entry of these nodes."""
        owner, at = expand(self._after_start[nodes].long(), self._after_start[nodes + 1].long())
        return rows[owner], self._after_token[at].long(), self._after_student_token[at].long()

    def _exact(self, rows: Tensor, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """Return the row and the teacher token of each token that spells one of these nodes exactly."""
        owner, at = expand(self._exact_start[nodes].long(), self._exact_start[nodes + 1].long())
        return rows[owner], self._exact_token[at].long()


def _first_tokens(tables: Tables, seen: FirstTokens | None) -> tuple[Indices, Indices, NDArray[np.float64]]:
    """Compute A_u for an empty u.

    Returns:
        The teacher token of each entry, ascending, its student token, and the share of the teacher token's mass. The
        shares of a teacher token sum to 1; one that the student cannot write has no entry.
    """
    alone = np.flatnonzero(tables.first >= 0)
    tokens, student_tokens = alone, tables.first[alone].astype(np.int64)
    counts = np.ones(len(alone))
    if seen is not None:
        tokens, student_tokens = (
            np.concatenate([tokens, seen.tokens]),
            np.concatenate([student_tokens, seen.student_tokens]),
        )
        counts = np.concatenate([counts, seen.counts])
    shares = counts / np.bincount(tokens, counts)[tokens]
    pairs, where = np.unique(tokens << 32 | student_tokens, return_inverse=True)
    return pairs >> 32, pairs & 0xFFFFFFFF, np.bincount(where, shares).astype(np.float64)


def _add(mass: Tensor, rows: Tensor, student_tokens: Tensor, values: Tensor) -> None:
    mass.view(-1).index_add_(0, rows * mass.shape[1] + student_tokens, values)


def _normalized(mass: Tensor, rest_mass: Tensor, share: Tensor, coverage: Tensor, places: Places) -> ProjectedTarget:
    """Scale mass and rest mass to probabilities; ``share`` is the factor that p'(t') has got."""
    total = mass.sum(-1) + rest_mass
    mass, unwritable = mass[:, :-1], mass[:, -1]

    # With a full support there is no token that the rest mass could belong to.
    full = mass.amin(-1) > 0
    rest_mass = (rest_mass + unwritable).masked_fill(full, 0)
    reached = mass.gather(1, places.student_token[:, None]).squeeze(1) > 0
    known = (total > FLOOR * share) & (reached | ~places.crossing)
    scale = (mass.sum(-1) + rest_mass).clamp(min=torch.finfo(total.dtype).tiny)
    return ProjectedTarget(mass.div_(scale[:, None]), rest_mass / scale, known, coverage)

"""Computes the student's targets of aligned rows from a teacher's outputs, and keeps the most likely tokens only."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from hymba_tune.distill.alignment import Alignment
from hymba_tune.distill.chunks import chunk_rows, expand
from hymba_tune.distill.losses import span_sums
from hymba_tune.distill.outputs import Outputs, Teacher
from hymba_tune.distill.pair import TokenizerPair
from hymba_tune.distill.projection import Places, Projection, SparseTarget, find_places
from hymba_tune.distill.tables import FirstTokens, Tables, open_tables, same_tokenizer
from hymba_tune.distill.targets import Targets


@dataclass
class CaptureStats:
    """Statistics of a teacher's pass over rows.

    Attributes:
        places: The number of student tokens.
        known: The student tokens that have a target.
        shared: The student tokens that begin where a teacher token begins.
        mass: The share of the teacher's probability that these keep, summed over them.
        tokens: The number of teacher tokens in the answers.
        own: The teacher's probabilities of these tokens, summed.
        ends: The teacher's end tokens after answers; those after plain texts do not count.
        end: The teacher's probabilities of these end tokens, summed.
    """

    places: int = 0
    known: int = 0
    shared: int = 0
    mass: float = 0.0
    tokens: int = 0
    own: float = 0.0
    ends: int = 0
    end: float = 0.0

    def add(self, other: CaptureStats) -> None:
        """Add the statistics of other rows."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    @property
    def mean_mass(self) -> float:
        """The mean share of the teacher's probability on tokens that the student can begin to write."""
        return self.mass / max(self.shared, 1)

    @property
    def mean_own(self) -> float:
        """The teacher's mean probability of the actual next token."""
        return self.own / max(self.tokens, 1)

    @property
    def mean_end(self) -> float:
        """The teacher's mean probability of its end token after an answer."""
        return self.end / max(self.ends, 1)


@dataclass(frozen=True, slots=True)
class TargetBatch:
    """The targets of a row, and the statistics of its pass."""

    targets: Targets
    stats: CaptureStats


def _find_alone(row: Alignment, tables: Tables) -> Places:
    """Find the places of a row when both sides have one tokenizer, where the previous-token term is zero."""
    places = find_places(row, tables)
    return replace(places, before=torch.full_like(places.before, -1))


@dataclass(frozen=True)
class TargetMaker:
    """Computes targets from a teacher's outputs.

    Attributes:
        teacher: The teacher, which reads the rows.
        tables: The tables of the pair.
        projection: The projection of the pair, on the device of the targets.
        top_k: The number of tokens stored in a target; the mass of all others is one value.
        temperature: The temperature of the teacher's probabilities in the targets; spans always use 1.
        find: A function that finds the student's tokens among the teacher's.
        end: The teacher's token that ends an answer.
    """

    teacher: Teacher
    tables: Tables
    projection: Projection
    top_k: int = 32
    temperature: float = 1.0
    find: Callable[[Alignment, Tables], Places] = field(default=find_places)
    end: int = -1

    @classmethod
    def of(
        cls,
        teacher: Teacher,
        pair: TokenizerPair,
        seen: FirstTokens | None,
        *,
        vocabulary: int,
        top_k: int,
        temperature: float,
        device: torch.device,
        tables_dir: Path,
    ) -> Self:
        """Create the target maker of a pair.

        Args:
            teacher: The teacher, which has the tokenizer of the pair's second side.
            pair: The two tokenizers.
            seen: The first student tokens in the user's texts.
            vocabulary: The rows of the student's output layer.
            top_k: The number of tokens stored in a target.
            temperature: The temperature of the teacher's probabilities.
            device: The device of the targets.
            tables_dir: The cache folder of the pair's tables; see `open_tables`.
        """
        tables = open_tables(pair, tables_dir)
        projection = Projection(tables, seen, vocabulary=vocabulary, device=device)
        find = _find_alone if same_tokenizer(pair) else find_places
        return cls(teacher, tables, projection, top_k, temperature, find, pair.teacher.end)

    @torch.no_grad()
    def __call__(self, rows: Sequence[Alignment]) -> Iterator[tuple[int, TargetBatch]]:
        """Compute the targets of aligned rows: each row's index and targets, in the order the teacher reads them."""
        for index, outputs in self.teacher.outputs([row.teacher_ids for row in rows]):
            yield index, self.teach(rows[index], outputs)

    @torch.no_grad()
    def teach(self, row: Alignment, outputs: Outputs) -> TargetBatch:
        """Compute the targets of one row from the teacher's outputs for it."""
        device = self.projection.device
        places = self.find(row, self.tables).to(device)
        spans = torch.from_numpy(row.spans).to(device)
        own = torch.full((len(row.teacher_ids),), math.nan, device=device)

        def probabilities(at: Tensor) -> tuple[Tensor, Tensor | None]:
            distribution = outputs.probabilities(at, self.temperature)
            own[at] = distribution.own
            return distribution.probs, distribution.cut

        step = chunk_rows(len(self.tables.first), self.projection.vocabulary)
        tops, known, coverage = [], [], []
        for begin in range(0, max(1, len(places)), step):
            target = self.projection.from_outputs(probabilities, places[begin : begin + step])
            tops.append(SparseTarget(*(part[target.known] for part in target.top(self.top_k))))
            known.append(target.known)
            coverage.append(target.coverage)

        # No target needs the outputs of teacher tokens that lie within one student token, but the spans do.
        first, last = spans[:, 2] - 1, spans[:, 3] - 1
        answered = expand(first, last)[1]
        for rest in answered[own[answered].isnan()].split(step):
            probabilities(rest)

        at = torch.from_numpy(row.student).to(device)[torch.cat(known)]
        top = SparseTarget(*map(torch.cat, zip(*tops, strict=True)))
        shared = places.inside == 0
        ending = last[torch.tensor(row.teacher_ids, device=device)[last] == self.end]
        ends = own[ending[:0] if row.plain else ending - 1].exp()
        stats = CaptureStats(
            places=len(places),
            known=len(at),
            shared=int(shared.sum()),
            mass=float(torch.cat(coverage)[shared].sum()),
            tokens=len(answered),
            own=float(own[answered].exp().sum()),
            ends=len(ends),
            end=float(ends.sum()),
        )
        return TargetBatch(Targets(at, top, spans[:, :2], span_sums(own, first, last)), stats)

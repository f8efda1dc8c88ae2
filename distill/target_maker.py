"""From aligned rows and what a teacher says of them to the student's targets, which keep the likeliest pieces only."""

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
    """What a pass shows of the teacher.

    Attributes:
        places: The student's tokens looked at.
        known: Those of them that have a target.
        shared: Those of them that begin where a token of the teacher's does.
        mass: How much of the teacher's probability these keep, in sum.
        tokens: The teacher's tokens in the answers.
        own: The probabilities that it gave them, in sum.
        ends: The teacher's end tokens after answers; those after plain texts do not count.
        end: The probabilities that it gave them, in sum.
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
        """Count another row, or many."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    @property
    def mean_mass(self) -> float:
        """Share of the teacher's probability that lies on tokens of which the student can write the beginning."""
        return self.mass / max(self.shared, 1)

    @property
    def mean_own(self) -> float:
        """The teacher's mean probability of its own actual next token."""
        return self.own / max(self.tokens, 1)

    @property
    def mean_end(self) -> float:
        """The teacher's mean probability of its end token after an answer."""
        return self.end / max(self.ends, 1)


@dataclass(frozen=True, slots=True)
class TargetBatch:
    """A row's targets, and what they show of the teacher."""

    targets: Targets
    kept: CaptureStats


def _find_alone(row: Alignment, tables: Tables) -> Places:
    """The places of one tokenizer, where the end of a token is no news: what came before it plays no part."""
    places = find_places(row, tables)
    return replace(places, before=torch.full_like(places.before, -1))


@dataclass(frozen=True)
class TargetMaker:
    """Turns what a teacher says into targets: a pass of the teacher over each batch of rows.

    Attributes:
        teacher: Any.
        tables: Of the pair.
        projection: Likewise, on the device where targets are to be.
        top_k: Pieces that a target tells apart; the others join its bucket.
        temperature: Of the teacher's probabilities in the targets; spans are always judged at 1.
        find: Where the student's tokens stand among the teacher's.
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
        """The maker of a pair's targets.

        Args:
            teacher: Whose tokenizer is the pair's second.
            pair: Both sides.
            seen: First pieces in the user's own texts.
            vocabulary: Rows of the student's head.
            top_k: See `TargetMaker`.
            temperature: See `TargetMaker`.
            device: Where targets are to be.
            tables_dir: Where the pair's tables are kept; see `open_tables`.
        """
        tables = open_tables(pair, tables_dir)
        projection = Projection(tables, seen, vocabulary=vocabulary, device=device)
        find = _find_alone if same_tokenizer(pair) else find_places
        return cls(teacher, tables, projection, top_k, temperature, find, pair.teacher.end)

    @torch.no_grad()
    def __call__(self, rows: Sequence[Alignment]) -> Iterator[tuple[int, TargetBatch]]:
        """Targets of aligned rows: which row, and what it is taught, in whatever order the teacher reads them."""
        for index, outputs in self.teacher.outputs([row.teacher_ids for row in rows]):
            yield index, self.teach(rows[index], outputs)

    @torch.no_grad()
    def teach(self, row: Alignment, outputs: Outputs) -> TargetBatch:
        """Compute the targets of one row from the teacher's outputs for it."""
        device = self.projection.device
        places, spans = self.find(row, self.tables).to(device), torch.from_numpy(row.spans).to(device)
        own = torch.full((len(row.teacher_ids),), math.nan, device=device)

        def probabilities(at: Tensor) -> tuple[Tensor, Tensor | None]:
            told = outputs.probabilities(at, self.temperature)
            own[at] = told.own
            return told.probs, told.cut

        step = chunk_rows(len(self.tables.first), self.projection.vocabulary)
        tops, known, kept = [], [], []
        for begin in range(0, max(1, len(places)), step):
            target = self.projection.from_outputs(probabilities, places[begin : begin + step])
            tops.append(SparseTarget(*(part[target.known] for part in target.top(self.top_k))))
            known.append(target.known)
            kept.append(target.kept)
        first, last = spans[:, 2] - 1, spans[:, 3] - 1
        answered = expand(first, last)[1]
        for rest in answered[own[answered].isnan()].split(step):  # tokens that one piece of the student's goes across
            probabilities(rest)
        at = torch.from_numpy(row.student).to(device)[torch.cat(known)]
        top = SparseTarget(*map(torch.cat, zip(*tops, strict=True)))
        shared = places.inside == 0
        ending = last[torch.tensor(row.teacher_ids, device=device)[last] == self.end]
        ends = own[ending[:0] if row.plain else ending - 1].exp()
        shown = CaptureStats(
            places=len(places),
            known=len(at),
            shared=int(shared.sum()),
            mass=float(torch.cat(kept)[shared].sum()),
            tokens=len(answered),
            own=float(own[answered].exp().sum()),
            ends=len(ends),
            end=float(ends.sum()),
        )
        return TargetBatch(Targets(at, top, spans[:, :2], span_sums(own, first, last)), shown)

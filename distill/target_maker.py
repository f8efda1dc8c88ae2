"""Computes the student's targets of aligned rows from a teacher's outputs, and keeps the most likely tokens only."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hymba_tune.distill.alignment import Alignment
from hymba_tune.distill.chunks import chunk_rows, expand
from hymba_tune.distill.losses import span_sums
from hymba_tune.distill.outputs import Outputs, Teacher
from hymba_tune.distill.pair import TokenizerPair
from hymba_tune.distill.projection import Places, Projection, SparseTarget, find_places
from hymba_tune.distill.tables import FirstTokens, Tables, open_tables, same_tokenizer
from hymba_tune.distill.targets import Targets
from hymba_tune.distributed.processes import first_of_node


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
    """The targets of a row, and its statistics."""

    targets: Targets
    stats: CaptureStats


def _find_alone(row: Alignment, tables: Tables) -> Places:
    """Find the places of a row when both sides have one tokenizer, where the previous-token term is zero."""
    places = find_places(row, tables)
    return replace(places, before=torch.from_numpy(np.full(len(places), -1)))


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
        with first_of_node("building the tables of the two tokenizers"):
            tables = open_tables(pair, tables_dir)
        projection = Projection(tables, seen, vocabulary=vocabulary, device=device)
        find = _find_alone if same_tokenizer(pair) else find_places
        return cls(teacher, tables, projection, top_k, temperature, find, pair.teacher.end)

    @property
    def _step(self) -> int:
        """The number of student tokens that are projected at a time."""
        sizes = len(self.tables.first), self.projection.vocabulary
        return chunk_rows(*sizes, device=self.projection.device)

    @torch.no_grad()
    def __call__(self, rows: Sequence[Alignment]) -> Iterator[tuple[int, TargetBatch]]:
        """Compute the targets of aligned rows: each row's index and targets, in the order the teacher reads them.

        The targets are on the CPU. As many rows as fit are projected at a time.
        """
        waiting: dict[int, Outputs] = {}
        places = 0
        for index, outputs in self.teacher.outputs([row.teacher_ids for row in rows]):
            waiting[index] = outputs
            places += len(rows[index].student)
            if places >= self._step:
                yield from self._teach(rows, waiting)
                waiting, places = {}, 0
        yield from self._teach(rows, waiting)

    def _teach(self, rows: Sequence[Alignment], read: dict[int, Outputs]) -> Iterator[tuple[int, TargetBatch]]:
        batches = self.teach([rows[index] for index in read], [*read.values()], device=torch.device("cpu"))
        yield from zip(read, batches, strict=True)

    @torch.no_grad()
    def teach(
        self, rows: Sequence[Alignment], outputs: Sequence[Outputs], *, device: torch.device | None = None
    ) -> list[TargetBatch]:
        """Compute the targets of rows from the teacher's outputs for them, in one pass over all of their tokens.

        Args:
            rows: The aligned rows.
            outputs: The teacher's outputs for each row.
            device: The device of the result; by default that of the projection.
        """
        if not rows:
            return []
        here = self.projection.device
        starts = np.cumsum([0, *map(len, outputs)])[:-1].tolist()
        places = Places.joined([self.find(row, self.tables) for row in rows], starts).to(here)
        student = torch.from_numpy(np.concatenate([row.student for row in rows])).to(here)
        spans = torch.from_numpy(np.concatenate([row.spans for row in rows])).to(here)
        ranges = np.concatenate([row.spans[:, 2:] - 1 + start for row, start in zip(rows, starts, strict=True)])
        first, last = torch.from_numpy(ranges).to(here).unbind(1)

        top, known, coverage, own = self._project(type(outputs[0]).joined(outputs), places, expand(first, last)[1])
        targets = Targets(student[known], top, spans[:, :2], span_sums(own, first, last)).to(device or here)
        stats = [*self._stats(rows, starts, known.cpu().numpy(), coverage.cpu().numpy(), own.cpu().exp().numpy())]
        split = targets.split([one.known for one in stats], [len(row.spans) for row in rows])
        return [TargetBatch(*both) for both in zip(split, stats, strict=True)]

    def _project(
        self, outputs: Outputs, places: Places, answered: Tensor
    ) -> tuple[SparseTarget, Tensor, Tensor, Tensor]:
        """Project the teacher's outputs at all places, a chunk at a time.

        Args:
            outputs: The outputs that the places index.
            places: The places.
            answered: The outputs whose likelihoods of the actual next token are needed, whatever the places need.

        Returns:
            The most likely tokens where there is a target; where there is one; the coverage of each place; and for each
            output the log-likelihood of the actual next token, NaN where it is not needed.
        """
        own = torch.full((len(outputs),), math.nan, device=self.projection.device)

        def probabilities(at: Tensor) -> tuple[Tensor, Tensor | None]:
            distribution = outputs.probabilities(at, self.temperature)
            own[at] = distribution.own
            return distribution.probs, distribution.cut

        tops, known, coverage = [], [], []
        for begin in range(0, max(1, len(places)), self._step):
            target = self.projection.from_outputs(probabilities, places[begin : begin + self._step])
            tops.append(target.top(self.top_k))
            known.append(target.known)
            coverage.append(target.coverage)

        # No target needs the outputs of teacher tokens that lie within one student token, but the spans do.
        for rest in answered[own[answered].isnan()].split(self._step):
            probabilities(rest)
        where = torch.cat(known)
        top = SparseTarget(*(torch.cat(parts)[where] for parts in zip(*tops, strict=True)))
        return top, where, torch.cat(coverage), own

    def _stats(
        self,
        rows: Sequence[Alignment],
        starts: Sequence[int],
        known: NDArray[np.bool_],
        coverage: NDArray[np.float32],
        own: NDArray[np.float32],
    ) -> Iterator[CaptureStats]:
        """Compute each row's statistics; see `_project`, with ``own`` as probabilities."""
        begin = 0
        for row, start in zip(rows, starts, strict=True):
            part = slice(begin, begin + len(row.student))
            begin = part.stop
            shared = row.spelled == 0
            answered = np.concatenate([np.arange(0), *map(np.arange, row.spans[:, 2] - 1, row.spans[:, 3] - 1)])
            last = row.spans[:, 3] - 1
            ending = last[np.array(row.teacher_ids, np.int64)[last] == self.end] - 1
            ends = ending[:0] if row.plain else ending
            yield CaptureStats(
                places=len(row.student),
                known=int(known[part].sum()),
                shared=int(shared.sum()),
                mass=float(coverage[part][shared].sum()),
                tokens=len(answered),
                own=float(own[start + answered].sum()),
                ends=len(ends),
                end=float(own[start + ends].sum()),
            )

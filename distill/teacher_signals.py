"""The teacher's terms of the loss of a batch: from cached targets, or from a forward of the teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from datasets import Dataset
from torch import Tensor

from hymba_tune.config.distill import Stage
from hymba_tune.distill.alignment import Alignment
from hymba_tune.distill.chunks import Head
from hymba_tune.distill.losses import forward_kl, jensen_shannon, reverse_kl, sorted_uld
from hymba_tune.distill.objective import SpanTerm, TokenTerm, span_term, sparse_term
from hymba_tune.distill.outputs import HeadOutputs
from hymba_tune.distill.rows import alignment
from hymba_tune.distill.target_maker import TargetMaker
from hymba_tune.distill.targets import Targets

FROM_TARGETS = {"kl", "projection", "alm"}
"""Losses that cached targets are enough for."""
Terms = tuple[TokenTerm | None, SpanTerm | None]


class RowSpan(NamedTuple):
    """The position of a row in a batch.

    Attributes:
        row: The number of the row; -1 - i for the i-th rollout of the step.
        offset: The position of its first token in the flattened batch, padding included.
    """

    row: int
    offset: int


@dataclass(frozen=True)
class LossParameters:
    """Parameters of the losses other than their weights.

    Attributes:
        temperature: The temperature of the compared probabilities.
        tau: The temperature of the alm loss.
        beta: The teacher's share of the mixture in the jsd loss.
    """

    temperature: float
    tau: float
    beta: float


@dataclass(frozen=True)
class TeacherSignals:
    """The source of the teacher's terms of the loss.

    Attributes:
        shape: The parameters of the losses.
        device: The device of the student.
        targets: The cached targets of each row, if there are any.
        online: The teacher in memory, if there is one.
    """

    shape: LossParameters
    device: torch.device
    targets: Sequence[Targets] | None = None
    online: OnlineTeacher | None = None

    def terms(self, places: Sequence[RowSpan], stage: Stage, rollouts: Sequence[Alignment] = ()) -> Terms:
        """Compute the terms of a stage's losses for a batch.

        Args:
            places: The places of the rows, by ascending offset.
            stage: The stage with the losses.
            rollouts: The alignments of the answers that the student wrote.

        Raises:
            ValueError: If a loss needs the teacher in memory, and it is not.
        """
        losses = stage.losses.keys() - {"ce"}
        if not losses or not places:
            return None, None
        if self.targets is not None and losses <= FROM_TARGETS and all(place.row >= 0 for place in places):
            return self._from_targets([self.targets[place.row] for place in places], places, stage.losses)
        if self.online is None:
            raise ValueError(f"{', '.join(sorted(losses))}: these losses need the teacher in memory, and it is not")
        rows = [self.online.row(place.row, rollouts) for place in places]
        row_outputs = self.online.forward(rows)
        full = []
        if losses - {"projection", "alm"}:
            full = self.online.full_terms(rows, row_outputs, places, stage.losses, self.shape)
        tokens: TokenTerm | None = None
        spans: SpanTerm | None = None
        if losses & {"projection", "alm"}:
            # The full vocabulary has given the kl term already.
            without_kl = {name: weight for name, weight in stage.losses.items() if name != "kl"}
            tokens, spans = self._from_targets(self.online.make_targets(rows, row_outputs), places, without_kl)
        return joined_terms([*full, *([tokens] if tokens else [])]), spans

    def _from_targets(self, rows: Sequence[Targets], places: Sequence[RowSpan], losses: Mapping[str, float]) -> Terms:
        batch = Targets.joined(rows, [place.offset for place in places]).to(self.device)
        weight = losses.get("projection", 0.0) + losses.get("kl", 0.0)
        tokens = sparse_term(batch, temperature=self.shape.temperature, weight=weight) if weight else None
        if "alm" not in losses:
            return tokens, None
        projects = "projection" in losses
        return tokens, span_term(batch, tau=self.shape.tau, weight=losses["alm"], only_without_target=projects)


@dataclass(frozen=True)
class OnlineTeacher:
    """A teacher in memory during the training of the student.

    Attributes:
        maker: Computes the teacher's targets.
        rows: All rows of the data; see `hymba_tune.distill.rows`.
    """

    maker: TargetMaker
    rows: Dataset

    def row(self, number: int, rollouts: Sequence[Alignment]) -> Alignment:
        """Return a row of the data or a rollout by its number; see `RowSpan`."""
        return alignment(self.rows[number]) if number >= 0 else rollouts[-1 - number]

    def forward(self, rows: Sequence[Alignment]) -> list[HeadOutputs]:
        """Run the teacher on rows."""
        return self.maker.teacher.full_vocabulary([row.teacher_ids for row in rows])

    def make_targets(self, rows: Sequence[Alignment], row_outputs: Sequence[HeadOutputs]) -> list[Targets]:
        """Compute targets from the teacher's outputs."""
        return [batch.targets for batch in self.maker.teach(rows, row_outputs)]

    def full_terms(
        self,
        rows: Sequence[Alignment],
        row_outputs: Sequence[HeadOutputs],
        places: Sequence[RowSpan],
        losses: Mapping[str, float],
        shape: LossParameters,
    ) -> list[TokenTerm]:
        """Return the terms that compare full vocabularies, at tokens of both sides that begin at the same byte."""
        at: list[Tensor] = []
        hidden: list[Tensor] = []
        for row, outputs, place in zip(rows, row_outputs, places, strict=True):
            both = row.spelled == 0
            at.append(torch.from_numpy(row.student[both]) + place.offset)
            hidden.append(outputs.head.hidden[torch.from_numpy(row.teacher[both] - 1)])
        weight = row_outputs[0].head.weight
        teacher = Head(torch.cat(hidden), weight)
        where = torch.cat(at).to(weight.device)
        known: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "kl": partial(_on_common, partial(forward_kl, temperature=shape.temperature)),
            "reverse-kl": partial(_on_common, partial(reverse_kl, temperature=shape.temperature)),
            "jsd": partial(_on_common, partial(jensen_shannon, beta=shape.beta, temperature=shape.temperature)),
            "uld": partial(sorted_uld, temperature=shape.temperature),
        }

        def compared(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, slice], Tensor]:
            return lambda logits, part: loss(logits, teacher.logits(part))

        return [
            TokenTerm(where, compared(known[name]), factor, len(weight))
            for name, factor in losses.items()
            if name in known
        ]


def _on_common(loss: Callable[[Tensor, Tensor], Tensor], student: Tensor, teacher: Tensor) -> Tensor:
    """Compute a loss on the common vocabulary, because output layers may be padded to different sizes."""
    size = min(student.shape[1], teacher.shape[1])
    return loss(student[:, :size], teacher[:, :size])


def joined_terms(terms: Sequence[TokenTerm]) -> TokenTerm | None:
    """Join several terms into one: at each token the weighted sum of the terms that cover it."""
    if len(terms) < 2:
        return terms[0] if terms else None
    at = torch.cat([term.at for term in terms]).unique()
    where = [torch.searchsorted(at, term.at) for term in terms]

    def loss(logits: Tensor, part: slice) -> Tensor:
        total = logits.new_zeros(len(logits))
        for term, own in zip(terms, where, strict=True):
            begin, end = torch.searchsorted(own, own.new_tensor([part.start, part.stop])).tolist()
            if end > begin:
                here = own[begin:end] - part.start
                values = term.weight * term.loss(logits[here], slice(begin, end))
                total = total.index_add(0, here, values.to(total.dtype))
        return total

    return TokenTerm(at, loss, 1.0, sum(term.vocabulary for term in terms))

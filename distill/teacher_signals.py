"""What a teacher says of the tokens of a batch, as terms of the loss: from its kept targets, or asked now."""

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
"""Losses for which kept targets will do."""
Terms = tuple[TokenTerm | None, SpanTerm | None]


class RowSpan(NamedTuple):
    """Where a row stands in a batch.

    Attributes:
        row: Its number; -1 - i for the i-th of the answers that the student wrote itself.
        offset: Of its first token among all of the batch's, its rows laid end to end, padding included.
    """

    row: int
    offset: int


@dataclass(frozen=True)
class LossParameters:
    """What losses are told beside their weights.

    Attributes:
        temperature: Of the probabilities compared.
        tau: Of the alm loss.
        beta: Of the jsd loss.
    """

    temperature: float
    tau: float
    beta: float


@dataclass(frozen=True)
class TeacherSignals:
    """What a teacher has to say of rows.

    Attributes:
        shape: Of the losses.
        device: Where the student computes.
        targets: Those of each row that the teacher left, if they are kept.
        online: The teacher itself, if it is in memory.
    """

    shape: LossParameters
    device: torch.device
    targets: Sequence[Targets] | None = None
    online: OnlineTeacher | None = None

    def terms(self, places: Sequence[RowSpan], stage: Stage, own: Sequence[Alignment] = ()) -> Terms:
        """Of a batch's rows, what a stage's losses ask for.

        Args:
            places: Of the rows, by ascending offsets.
            stage: Whose losses they are.
            own: The answers that the student wrote itself.
        """
        losses = stage.losses.keys() - {"ce"}
        if not losses or not places:
            return None, None
        if self.targets is not None and losses <= FROM_TARGETS and all(place.row >= 0 for place in places):
            return self._from_targets([self.targets[place.row] for place in places], places, stage.losses)
        if self.online is None:
            raise ValueError(f"{', '.join(sorted(losses))}: these losses need the teacher in memory, and it is not")
        rows = [self.online.row(place.row, own) for place in places]
        row_outputs = self.online.forward(rows)
        whole = []
        if losses - {"projection", "alm"}:
            whole = self.online.whole_terms(rows, row_outputs, places, stage.losses, self.shape)
        told: Terms = None, None
        if losses & {"projection", "alm"}:
            without_kl = {name: weight for name, weight in stage.losses.items() if name != "kl"}
            told = self._from_targets(self.online.make_targets(rows, row_outputs), places, without_kl)
        return joined_terms([*whole, *([told[0]] if told[0] else [])]), told[1]

    def _from_targets(self, rows: Sequence[Targets], places: Sequence[RowSpan], losses: Mapping[str, float]) -> Terms:
        batch = Targets.joined(rows, [place.offset for place in places]).to(self.device)
        weight = losses.get("projection", 0.0) + losses.get("kl", 0.0)
        tokens = sparse_term(batch, temperature=self.shape.temperature, weight=weight) if weight else None
        if "alm" not in losses:
            return tokens, None
        beside = "projection" in losses
        return tokens, span_term(batch, tau=self.shape.tau, weight=losses["alm"], only_without_target=beside)


@dataclass(frozen=True)
class OnlineTeacher:
    """A teacher in memory beside its student.

    Attributes:
        maker: Makes its targets.
        rows: All rows of the data; see `hymba_tune.distill.rows`.
    """

    maker: TargetMaker
    rows: Dataset

    def row(self, number: int, own: Sequence[Alignment]) -> Alignment:
        """A row of the data, or one that the student wrote; see `RowSpan`."""
        return alignment(self.rows[number]) if number >= 0 else own[-1 - number]

    def forward(self, rows: Sequence[Alignment]) -> list[HeadOutputs]:
        """What the teacher says of rows, read now."""
        return self.maker.teacher.full_vocabulary([row.teacher_ids for row in rows])

    def make_targets(self, rows: Sequence[Alignment], row_outputs: Sequence[HeadOutputs]) -> list[Targets]:
        """Targets from what was heard."""
        return [self.maker.teach(row, outputs).targets for row, outputs in zip(rows, row_outputs, strict=True)]

    def whole_terms(
        self,
        rows: Sequence[Alignment],
        row_outputs: Sequence[HeadOutputs],
        places: Sequence[RowSpan],
        losses: Mapping[str, float],
        shape: LossParameters,
    ) -> list[TokenTerm]:
        """The losses that compare whole vocabularies, where both sides' tokens begin together."""
        at, hidden = [], []
        for row, outputs, place in zip(rows, row_outputs, places, strict=True):
            both = row.spelled == 0
            at.append(torch.from_numpy(row.student[both]) + place.offset)
            hidden.append(outputs.head.hidden[torch.from_numpy(row.teacher[both] - 1)])
        weight = row_outputs[0].head.weight
        teacher, where = Head(torch.cat(hidden), weight), torch.cat(at).to(weight.device)
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
    """A loss on the tokens of one tokenizer: what output layers have beyond them is left out."""
    size = min(student.shape[1], teacher.shape[1])
    return loss(student[:, :size], teacher[:, :size])


def joined_terms(terms: Sequence[TokenTerm]) -> TokenTerm | None:
    """Several losses as one: at each token the weighted sum of those that speak of it."""
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

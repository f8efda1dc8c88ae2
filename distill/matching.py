"""The loss between the student's and the teacher's hidden states, with learned projections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, mse_loss

from hymba_tune.distill.alignment import Alignment
from hymba_tune.distill.teacher_signals import OnlineTeacher, RowSpan
from hymba_tune.footprint import MOMENT_BYTES

FILE = "hidden_match.safetensors"
"""The file of the projections in a checkpoint. They are not part of the trained model."""


class Layers(NamedTuple):
    """The width and number of layers of a model."""

    width: int
    layers: int

    @classmethod
    def of(cls, config: Any) -> Self:
        """Read them from a model's configuration."""
        text = config.get_text_config()
        return cls(text.hidden_size, text.num_hidden_layers)


class HiddenMatch(nn.Module):
    """A linear projection from each student layer to the teacher layer at the same relative depth.

    Args:
        student: The student's layers.
        teacher: The teacher's layers.
        kind: ``cosine`` compares directions, ``mse`` compares values.
    """

    def __init__(self, student: Layers, teacher: Layers, kind: Literal["cosine", "mse"]) -> None:
        super().__init__()
        deeper = teacher.layers / student.layers
        self.layers = [(layer, round(layer * deeper)) for layer in range(1, student.layers + 1)]
        self.maps = nn.ModuleList(nn.Linear(student.width, teacher.width, bias=False) for _ in self.layers)
        self._kind = kind
        self._teacher_width = teacher.width
        if student.width == teacher.width:
            for projection in self.maps:
                nn.init.eye_(projection.weight)  # type: ignore[arg-type]

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor] | Mapping[int, Tensor]) -> Tensor:
        """Compute the distance between the student's and the teacher's hidden states.

        Args:
            student: The student's states at N tokens, ``(N, d)`` each: the embeddings, then after each layer.
            teacher: The teacher's states at the same tokens, in the same order; constants.

        Returns:
            The sum over tokens of the mean over layers, a float32 scalar: 1 - cosine, or the mean square of the
            difference.
        """
        total = student[0].new_zeros((), dtype=torch.float32)
        for projection, (ours, theirs) in zip(self.maps, self.layers, strict=True):
            projected = projection(student[ours].float()).float()
            reference = teacher[theirs].float()
            if self._kind == "cosine":
                total = total + (1 - cosine_similarity(projected, reference, dim=-1)).sum()
            else:
                total = total + mse_loss(projected, reference, reduction="none").mean(-1).sum()
        return total / len(self.layers)

    def nothing(self, student: Sequence[Tensor]) -> Tensor:
        """Compute the distance at no tokens: a zero, which gives all projections zero gradients."""
        width = self._teacher_width
        teacher = {theirs: student[0].new_zeros(0, width) for _, theirs in self.layers}
        distance: Tensor = self([state.flatten(0, 1)[:0] for state in student], teacher)
        return distance

    def save(self, folder: Path, weights: Mapping[str, Tensor] | None = None) -> None:
        """Save the projections in a checkpoint; their weights are given where each process has a part of them."""
        found = self.state_dict() if weights is None else weights
        save_file({name: weight.contiguous() for name, weight in found.items()}, folder / FILE)

    def load(self, folder: Path) -> None:
        """Load the projections of a checkpoint."""
        self.load_state_dict(load_file(folder / FILE))


@dataclass(frozen=True)
class HiddenStateLoss:
    """The hidden-state loss of a run.

    Attributes:
        match: The projections, which are trained with the student.
        teacher: The teacher in memory.
        weight: The weight of this loss relative to the other losses.
    """

    match: HiddenMatch
    teacher: OnlineTeacher
    weight: float

    def __call__(self, states: Sequence[Tensor], places: Sequence[RowSpan], rollouts: Sequence[Alignment]) -> Tensor:
        """Compute the distance between the two sides' hidden states where both predict the same tokens.

        Args:
            states: The student's hidden states for a batch, ``(B, L, d)`` each.
            places: The places of the batch's rows.
            rollouts: The alignments of the answers that the student wrote.

        Returns:
            The unweighted sum over the tokens; see `HiddenMatch`.
        """
        if not places:  # the projections take part all the same, as in the other processes
            return self.match.nothing(states)
        rows = [self.teacher.row(place.row, rollouts) for place in places]
        # The state before a token predicts it.
        at = [torch.from_numpy(row.student - 1) + place.offset for row, place in zip(rows, places, strict=True)]
        before = [torch.from_numpy(row.teacher - 1) for row in rows]
        theirs = self.teacher.maker.teacher.hidden_states([row.teacher_ids for row in rows], before)
        positions = torch.cat(at).to(states[0].device)
        distance: Tensor = self.match([state.flatten(0, 1)[positions] for state in states], theirs)
        return distance


def match_bytes(student: Layers, teacher: Layers, *, tokens: int, dtype: torch.dtype, optimizer: str) -> int:
    """Estimate the bytes that a step needs for the hidden-state loss.

    Args:
        student: The student's layers.
        teacher: The teacher's layers.
        tokens: The tokens of a batch.
        dtype: The dtype of the teacher.
        optimizer: The optimizer of the projections, by its name in `MOMENT_BYTES`.
    """
    states = (teacher.layers + 1) * teacher.width * dtype.itemsize
    compared = student.layers * 4 * (student.width + 2 * teacher.width)  # kept in float32 for the gradients
    projections = student.layers * student.width * teacher.width
    return tokens * (states + compared) + round(projections * (4 + 4 + MOMENT_BYTES[optimizer]))

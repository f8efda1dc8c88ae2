"""Drawing a student's hidden states to its teacher's, through projections that are learned beside it."""

from __future__ import annotations

from collections.abc import Sequence
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
"""In a checkpoint. Nothing of it belongs to what is trained."""


class Layers(NamedTuple):
    """The width and number of layers of a model."""

    width: int
    layers: int

    @classmethod
    def of(cls, config: Any) -> Self:
        """By a model's configuration."""
        text = config.get_text_config()
        return cls(text.hidden_size, text.num_hidden_layers)


class HiddenMatch(nn.Module):
    """A linear projection for each of the student's layers, to that of the teacher which is as deep in proportion.

    Args:
        student: Who learns.
        teacher: Whom from.
        kind: ``cosine`` compares directions, ``mse`` values.
    """

    def __init__(self, student: Layers, teacher: Layers, kind: Literal["cosine", "mse"]) -> None:
        super().__init__()
        deeper = teacher.layers / student.layers
        self.layers = [(layer, round(layer * deeper)) for layer in range(1, student.layers + 1)]
        self.maps = nn.ModuleList(nn.Linear(student.width, teacher.width, bias=False) for _ in self.layers)
        self._kind = kind
        if student.width == teacher.width:
            for projection in self.maps:
                nn.init.eye_(projection.weight)  # type: ignore[arg-type]

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """How far the student is from the teacher.

        Args:
            student: Its states at N tokens, ``(N, d)`` each: the embeddings, then after each layer.
            teacher: Likewise, at the same tokens; constants.

        Returns:
            The sum over tokens of the mean over layers, a float32 scalar: 1 - cosine, or the mean square of the
            difference.
        """
        total = student[0].new_zeros((), dtype=torch.float32)
        for projection, (ours, theirs) in zip(self.maps, self.layers, strict=True):
            found, wanted = projection(student[ours].float()).float(), teacher[theirs].float()
            if self._kind == "cosine":
                total = total + (1 - cosine_similarity(found, wanted, dim=-1)).sum()
            else:
                total = total + mse_loss(found, wanted, reduction="none").mean(-1).sum()
        return total / len(self.layers)

    def save(self, folder: Path) -> None:
        """Write the projections into a checkpoint."""
        save_file({name: weight.contiguous() for name, weight in self.state_dict().items()}, folder / FILE)

    def load(self, folder: Path) -> None:
        """Take up a checkpoint's projections."""
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
        rows = [self.teacher.row(place.row, rollouts) for place in places]
        # The state before a token predicts it.
        at = [torch.from_numpy(row.student - 1) + place.offset for row, place in zip(rows, places, strict=True)]
        before = [torch.from_numpy(row.teacher - 1) for row in rows]
        theirs = self.teacher.maker.teacher.hidden_states([row.teacher_ids for row in rows], before)
        positions = torch.cat(at).to(states[0].device)
        distance: Tensor = self.match([state.flatten(0, 1)[positions] for state in states], theirs)
        return distance


def match_bytes(student: Layers, teacher: Layers, *, tokens: int, dtype: torch.dtype, optimizer: str) -> int:
    """Bytes that a step takes to compare hidden states, about.

    Args:
        student: Who learns.
        teacher: Whom from.
        tokens: Of a batch.
        dtype: Of the teacher.
        optimizer: Of the projections, by its name in `MOMENT_BYTES`.
    """
    told = (teacher.layers + 1) * teacher.width * dtype.itemsize
    compared = student.layers * 4 * (student.width + 2 * teacher.width)  # kept in float32 for the gradients
    projections = student.layers * student.width * teacher.width
    return tokens * (told + compared) + round(projections * (4 + 4 + MOMENT_BYTES[optimizer]))

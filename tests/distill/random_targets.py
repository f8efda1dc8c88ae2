"""Random targets of rows, always the same for a row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import datasets
import torch

from hymba_tune.distill.alignment import Alignment
from hymba_tune.distill.projection import SparseTarget
from hymba_tune.distill.rows import COLUMNS
from hymba_tune.distill.target_maker import CaptureStats, TargetBatch
from hymba_tune.distill.targets import Targets

VOCABULARY, K = 32_001, 32
KEY = {"version": 1, "teacher": "a" * 64, "top_k": K, "vocabulary": VOCABULARY, "temperature": 1.0, "data": "d"}


def random_targets(tokens: int, seed: int, top_k: int = K, vocabulary: int = VOCABULARY) -> Targets:
    """As a teacher's: descending, some of no mass, between them and the remaining mass all there is."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, 500, generator=generator) * 4
    probs = logits.softmax(-1).sort(-1, descending=True).values
    top = probs[:, :top_k]
    top[:, -1] *= torch.rand(tokens, generator=generator) < 0.5
    student_tokens = torch.zeros(tokens, top_k, dtype=torch.int64)
    for row in student_tokens:
        row += torch.randperm(vocabulary, generator=generator)[:top_k]
    at = 5 + torch.randperm(2 * tokens, generator=generator)[:tokens].sort().values
    bounds = torch.stack([at, at + 1], 1)
    sparse = SparseTarget(student_tokens, top.log(), (1 - top.sum(-1)).clamp(min=0).log())
    return Targets(at, sparse, bounds, -torch.rand(tokens, generator=generator) * 9)


class RandomMaker:
    """Teaches rows by the number of their first token."""

    def __call__(self, rows: Sequence[Alignment]) -> Iterator[tuple[int, TargetBatch]]:
        for index in reversed(range(len(rows))):
            number = rows[index].student_ids[0]
            tokens = number % 7
            yield (
                index,
                TargetBatch(
                    random_targets(tokens, number), CaptureStats(tokens, tokens, tokens, tokens / 3, tokens, 0.1)
                ),
            )


def numbered_rows(count: int) -> datasets.Dataset:
    columns: dict[str, list[Any]] = {name: [[]] * count for name in (*COLUMNS, "place")}
    columns |= {"input_ids": [[number] for number in range(count)], "place": [""] * count}
    return datasets.Dataset.from_dict(columns)

"""Peak memory of the distillation losses from hidden states, as the batch grows: student 32,000 × teacher 128,000.

Forward and backward in float32, with hidden states of width 64, so that the heads' weights are small. The memory then
depends on the vocabularies. Every loss is measured in a separate process. The projection's tables are random, with the
sizes of a real pair.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import harness
import numpy as np
import torch
from torch import Tensor

from hymba_tune.distill import losses
from hymba_tune.distill.chunks import Head, chunk_rows, chunked_loss, log_likelihood
from hymba_tune.distill.projection import Places, Projection
from hymba_tune.distill.tables import Tables

STUDENT, TEACHER = 32_001, 128_256
WIDTH = 64
TOKENS = (2048, 8192)
NODES_A_TOKEN, ENTRIES_A_TOKEN = 2, 2


def main(arguments: list[str] | None = None) -> None:
    """Measure and report."""
    options = harness.options(__doc__, arguments, repeats=1)
    sizes, counts = ((300, 900), (16, 32)) if options.quick else ((STUDENT, TEACHER), TOKENS)
    rows: list[dict[str, harness.Cell]] = []
    for name in LOSSES:
        peaks = harness.in_child(peaks_of, name, sizes, counts, options.device)
        rows += [
            {
                "loss": name,
                "tokens": tokens,
                "peak MB": harness.megabytes(peak),
                "whole logits MB": 4 * tokens * sum(sizes) / 1e6,
            }
            for tokens, peak in zip(counts, peaks, strict=True)
        ]
    notes = [
        f"Student {sizes[0]:,} × teacher {sizes[1]:,} (for KL twice the student's); with gradients.",
        "Whole logits: one float32 tensor of each model's, which no loss allocates.",
    ]
    harness.report("distill_memory", list(rows[0]), rows, notes, options)


def peaks_of(name: str, sizes: tuple[int, int], counts: tuple[int, ...], device: torch.device) -> list[int | None]:
    """Peak memory of a loss and its backward, for each batch size in tokens."""
    loss = LOSSES[name](sizes, device)
    peaks = []
    for tokens in (8, *counts):  # the first is short, so that memory for loading is not counted
        student, teacher = (head(tokens, size, device) for size in sizes)
        for tensor in student:
            tensor.requires_grad_()
        peaks.append(harness.peak_memory(partial(step, loss, student, teacher), device))
    return peaks[1:]


Step = Callable[[Head, Head], Tensor]


def step(loss: Step, student: Head, teacher: Head) -> None:
    """Compute a loss and its gradients."""
    loss(student, teacher).backward()


def head(tokens: int, size: int, device: torch.device) -> Head:
    """A head with random hidden states and weights."""
    return Head(torch.randn(tokens, WIDTH, device=device), torch.randn(size, WIDTH, device=device) / 8)


def forward_kl(sizes: tuple[int, int], device: torch.device) -> Step:
    """Forward KL on the student's vocabulary, mixed with cross-entropy."""

    def loss(student: Head, teacher: Head) -> Tensor:
        same_vocabulary = Head(teacher.hidden, teacher.weight[: sizes[0]])
        targets = torch.zeros(len(student.hidden), dtype=torch.int64, device=device)

        def chunk(logits: Tensor, rows: slice) -> Tensor:
            data = losses.cross_entropy(logits, targets[rows])
            return losses.mix(data, losses.forward_kl(logits, same_vocabulary.logits(rows)), alpha=0.7)

        return chunked_loss(student, chunk, chunk_rows(sizes[0], sizes[0], device=torch.device("cpu")))

    return loss


def sorted_uld(sizes: tuple[int, int], _device: torch.device) -> Step:
    """ULD, with both distributions sorted."""

    def loss(student: Head, teacher: Head) -> Tensor:
        def chunk(logits: Tensor, rows: slice) -> Tensor:
            return losses.sorted_uld(logits, teacher.logits(rows))

        return chunked_loss(student, chunk, chunk_rows(*sizes, device=torch.device("cpu")))

    return loss


def alm(sizes: tuple[int, int], device: torch.device) -> Step:
    """ALM, with one token per span."""

    def loss(student: Head, teacher: Head) -> Tensor:
        targets = torch.zeros(len(student.hidden), dtype=torch.int64, device=device)
        rows = chunk_rows(*sizes, device=torch.device("cpu"))
        with torch.no_grad():
            teacher_likelihood = log_likelihood(teacher, targets, rows)
        return losses.alm(log_likelihood(student, targets, rows), teacher_likelihood, tau=100.0).sum()

    return loss


def projection(sizes: tuple[int, int], device: torch.device) -> Step:
    """The projection, applied chunk by chunk; half of the places are inside a teacher token."""
    rng = np.random.default_rng(0)
    nodes, entries = NODES_A_TOKEN * sizes[1], ENTRIES_A_TOKEN * sizes[1]

    def spread(count: int) -> np.ndarray:
        return np.sort(rng.integers(0, count, nodes + 1)).astype(np.int32)

    def any_of(size: int, count: int) -> np.ndarray:
        return rng.integers(0, size, count).astype(np.int32)

    empty = np.zeros(0, np.int32)
    tables = Tables(
        first=any_of(sizes[0], sizes[1]),
        **dict.fromkeys(("node_start", "node_at", "parent", "byte"), empty),
        after_start=spread(entries),
        after_token=any_of(sizes[1], entries),
        after_student_token=any_of(sizes[0], entries),
        exact_start=spread(sizes[1]),
        exact_token=any_of(sizes[1], sizes[1]),
    )
    project = Projection(tables, vocabulary=sizes[0], device=device)

    def loss(student: Head, teacher: Head) -> Tensor:
        tokens = len(student.hidden)
        places = Places(
            now=torch.arange(tokens),
            before=torch.arange(tokens) - 1,
            previous=torch.randint(sizes[1], (tokens,)),
            inside=torch.randint(nodes, (tokens,)) * (torch.arange(tokens) % 2),
            beyond=torch.randint(nodes, (tokens,)),
            crossing=torch.zeros(tokens, dtype=torch.bool),
            student_token=torch.randint(sizes[0], (tokens,)),
        ).to(device)

        def chunk(logits: Tensor, rows: slice) -> Tensor:
            return losses.projection_kl(logits, project.from_head(teacher, places[rows]))

        return chunked_loss(student, chunk, chunk_rows(*sizes, device=torch.device("cpu")))

    return loss


LOSSES: dict[str, Callable[[tuple[int, int], torch.device], Step]] = {
    "forward KL + CE": forward_kl,
    "projection": projection,
    "ALM": alm,
    "sorted ULD": sorted_uld,
}

if __name__ == "__main__":
    main()

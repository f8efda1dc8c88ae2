"""Attention over packed texts, forward and backward: its backends, and a windowed layer as texts grow.

Beside the backends stands what is usually done: PyTorch's `scaled_dot_product_attention` with one mask over all rows.
A windowed layer should need as much time and memory for a token of a long text as of a short one.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import harness
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hymba_tune.model.attention import ATTENTION
from hymba_tune.model.backends import Task
from hymba_tune.model.documents import Documents, find_documents

HEADS, GROUPS, WIDTH, VALUE_WIDTH = 5, 1, 64, 128
META = 32
DENSE = "sdpa, dense mask"
QUADRATIC = ("sdpa", DENSE)
"""What weighs all pairs of tokens."""
QUADRATIC_UP_TO = 4096
"""Tokens up to which that is tried: its memory grows with their square."""

Run = Callable[[Tensor, Tensor, Tensor, Documents, int | None], Tensor]


def main(arguments: list[str] | None = None) -> None:
    """Measure and report."""
    given = harness.options(__doc__, arguments, repeats=5)
    compare_backends(given)
    compare_lengths(given)


def compare_backends(given: harness.Options) -> None:
    """Every way there is on a training batch: time and memory."""
    lengths, window = ([24, 24], 8) if given.quick else ([512] * 4, 256)
    rows: list[dict[str, harness.Cell]] = []
    for dtype in given.dtypes:
        names = ways(given.device, dtype)
        peaks = {name: harness.in_child(peaks_of, name, [lengths], window, dtype, given.device)[0] for name in names}
        calls = {name: attend(name, lengths, window, dtype, given.device) for name in names}
        timings = harness.interleave(calls, given.repeats)
        rows += [
            {
                "dtype": harness.short(dtype),
                "way": name,
                **timing.cells(),
                "x dense mask": timings[DENSE].over(timing),
                "peak MB": harness.megabytes(peaks[name]),
            }
            for name, timing in timings.items()
        ]
    notes = [f"{len(lengths)} texts of {lengths[0]} tokens, window {window}, {shape()}."]
    harness.report("attention", list(rows[0]), rows, notes, given)


def compare_lengths(given: harness.Options) -> None:
    """One ever longer text in a windowed layer: what a token costs."""
    lengths, window = ([16, 32], 8) if given.quick else ([2048, 4096, 8192, 16384], 1024)
    dtype = given.dtypes[-1]
    cases = {
        name: [length for length in lengths if name not in QUADRATIC or length <= QUADRATIC_UP_TO]
        for name in ways(given.device, dtype)
    }
    peaks = {
        name: harness.in_child(peaks_of, name, [[length] for length in taken], window, dtype, given.device)
        for name, taken in cases.items()
    }
    calls = {
        f"{name}, {length} tokens": attend(name, [length], window, dtype, given.device)
        for name, taken in cases.items()
        for length in taken
    }
    timings = harness.interleave(calls, given.repeats)
    rows: list[dict[str, harness.Cell]] = []
    for name, taken in cases.items():
        for length, peak in zip(taken, peaks[name], strict=True):
            timing = timings[f"{name}, {length} tokens"]
            rows.append(
                {
                    "way": name,
                    "tokens": length,
                    **timing.cells(),
                    "us a token": timing.median / length * 1e6,
                    "peak MB": harness.megabytes(peak),
                    "peak kB a token": None if peak is None else peak / length / 1e3,
                }
            )
    notes = [f"One text, window {window}, {harness.short(dtype)}, {shape()}. The same a token is linear."]
    harness.report("attention_length", list(rows[0]), rows, notes, given)


def shape() -> str:
    """The heads, in words."""
    return f"{META} meta tokens, {HEADS} query and {GROUPS} key heads, widths {WIDTH}/{VALUE_WIDTH}"


def ways(device: torch.device, dtype: torch.dtype) -> dict[str, Run]:
    """The backends that can train here, the fastest first, and the dense mask."""
    obstacles = ATTENTION.obstacles(Task(device.type, dtype, widths=(WIDTH, VALUE_WIDTH)))
    usable = {name: ATTENTION.backends[name].run for name, obstacle in obstacles.items() if obstacle is None}
    return usable | {DENSE: dense_mask_attention}


def dense_mask_attention(query: Tensor, key: Tensor, value: Tensor, documents: Documents, window: int | None) -> Tensor:
    """As the backends: ``(M + T, heads, width)`` each to ``(M + T, H * v)``, through one mask over all rows."""
    rows, meta = torch.arange(query.shape[0], device=query.device), documents.num_meta
    text = torch.cat([documents.ids.new_full((meta,), -1), documents.ids])
    seen = (text == text[:, None]) & (rows[:, None] - rows <= (window or len(rows))) | (rows < meta)
    seen &= rows <= rows[:, None]
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
    output = scaled_dot_product_attention(query, key, value, attn_mask=seen, enable_gqa=True)
    return output[0].transpose(0, 1).flatten(1)


def attend(way: str, lengths: list[int], window: int, dtype: torch.dtype, device: torch.device) -> Callable[[], None]:
    """Forward, and backward to query, key and value."""
    generator = torch.Generator().manual_seed(0)
    rows = META + sum(lengths)
    shapes = [(rows, HEADS, WIDTH), (rows, GROUPS, WIDTH), (rows, GROUPS, VALUE_WIDTH)]
    leaves = [torch.randn(size, generator=generator).to(device, dtype).requires_grad_() for size in shapes]
    query, key, value = leaves
    offsets = torch.tensor([0, *accumulate(lengths)], device=device)
    documents = find_documents((1, sum(lengths)), device, num_meta=META, cu_seqlens=offsets)
    run = ways(device, dtype)[way]

    def call() -> None:
        output = run(query, key, value, documents, window)
        torch.autograd.grad(output, leaves, output.detach())

    return call


def peaks_of(
    way: str, batches: list[list[int]], window: int, dtype: torch.dtype, device: torch.device
) -> list[int | None]:
    """Peak memory for texts of these lengths, batch by batch."""
    attend(way, [8], window, dtype, device)()  # what is loaded or compiled on first use is not counted
    calls = (attend(way, lengths, window, dtype, device) for lengths in batches)
    return [harness.peak_memory(call, device) for call in calls]


if __name__ == "__main__":
    main()

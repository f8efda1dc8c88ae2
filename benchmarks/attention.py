"""Attention over packed texts, forward and backward: its backends, and a windowed layer as texts grow.

The backends are compared with the usual implementation: PyTorch's `scaled_dot_product_attention` with one mask over all
rows. In a windowed layer, time and memory per token should not depend on the text's length.
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
"""Variants that compute all pairs of tokens."""
QUADRATIC_UP_TO = 4096
"""Maximum length for these variants, whose memory grows with the square of the length."""

Run = Callable[[Tensor, Tensor, Tensor, Documents, int | None], Tensor]


def main(arguments: list[str] | None = None) -> None:
    """Measure and report."""
    options = harness.options(__doc__, arguments, repeats=5)
    compare_backends(options)
    compare_lengths(options)


def compare_backends(options: harness.Options) -> None:
    """Time and memory of every variant on a training batch."""
    lengths, window = ([24, 24], 8) if options.quick else ([512] * 4, 256)
    rows: list[dict[str, harness.Cell]] = []
    for dtype in options.dtypes:
        names = ways(options.device, dtype)
        peaks = {name: harness.in_child(peaks_of, name, [lengths], window, dtype, options.device)[0] for name in names}
        calls = {name: attend(name, lengths, window, dtype, options.device) for name in names}
        timings = harness.interleave(calls, options.repeats)
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
    harness.report("attention", list(rows[0]), rows, notes, options)


def compare_lengths(options: harness.Options) -> None:
    """Time and memory per token of one text in a windowed layer, as the text grows."""
    lengths, window = ([16, 32], 8) if options.quick else ([2048, 4096, 8192, 16384], 1024)
    dtype = options.dtypes[-1]
    cases = {
        name: [length for length in lengths if name not in QUADRATIC or length <= QUADRATIC_UP_TO]
        for name in ways(options.device, dtype)
    }
    peaks = {
        name: harness.in_child(peaks_of, name, [[length] for length in own_lengths], window, dtype, options.device)
        for name, own_lengths in cases.items()
    }
    calls = {
        f"{name}, {length} tokens": attend(name, [length], window, dtype, options.device)
        for name, own_lengths in cases.items()
        for length in own_lengths
    }
    timings = harness.interleave(calls, options.repeats)
    rows: list[dict[str, harness.Cell]] = []
    for name, own_lengths in cases.items():
        for length, peak in zip(own_lengths, peaks[name], strict=True):
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
    notes = [
        f"One text, window {window}, {harness.short(dtype)}, {shape()}. A constant time per token is linear scaling."
    ]
    harness.report("attention_length", list(rows[0]), rows, notes, options)


def shape() -> str:
    """The sizes of the layer, for notes."""
    return f"{META} meta tokens, {HEADS} query and {GROUPS} key heads, widths {WIDTH}/{VALUE_WIDTH}"


def ways(device: torch.device, dtype: torch.dtype) -> dict[str, Run]:
    """The backends that support training on this device, fastest first, and the dense mask."""
    obstacles = ATTENTION.obstacles(Task(device.type, dtype, widths=(WIDTH, VALUE_WIDTH)))
    usable = {name: ATTENTION.backends[name].run for name, obstacle in obstacles.items() if obstacle is None}
    return usable | {DENSE: dense_mask_attention}


def dense_mask_attention(query: Tensor, key: Tensor, value: Tensor, documents: Documents, window: int | None) -> Tensor:
    """Same as the backends, ``(M + T, heads, width)`` each to ``(M + T, H * v)``, with one mask over all rows."""
    rows = torch.arange(query.shape[0], device=query.device)
    meta = documents.num_meta
    text = torch.cat([documents.ids.new_full((meta,), -1), documents.ids])
    mask = (text == text[:, None]) & (rows[:, None] - rows <= (window or len(rows))) | (rows < meta)
    mask &= rows <= rows[:, None]
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
    output = scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    return output[0].transpose(0, 1).flatten(1)


def attend(way: str, lengths: list[int], window: int, dtype: torch.dtype, device: torch.device) -> Callable[[], None]:
    """A call that runs forward, and backward to query, key and value."""
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
    """Peak memory of each batch of texts with these lengths."""
    attend(way, [8], window, dtype, device)()  # so that memory for loading and compiling is not counted
    calls = (attend(way, lengths, window, dtype, device) for lengths in batches)
    return [harness.peak_memory(call, device) for call in calls]


if __name__ == "__main__":
    main()

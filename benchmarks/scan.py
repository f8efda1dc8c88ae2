"""The selective scan, forward and backward: its backends against the plain recurrence, and time as texts grow.

"reference" computes one token after the other, separated with `unbind`; speedups are relative to it. The second table
has one text of growing length: the time per token should not depend on the length.
"""

from __future__ import annotations

from functools import partial
from itertools import accumulate

import harness
import torch
from torch import Tensor

from hymba_tune.memory import keep_freed_memory
from hymba_tune.model.backends import Task
from hymba_tune.model.scan import SCAN, selective_scan

STATES = 16
Shape = tuple[int, list[int]]
"""The number of channels, and the lengths of the texts."""
SHAPES: list[Shape] = [(640, [512] * 4), (3200, [512])]
TOY_SHAPES: list[Shape] = [(32, [8, 8])]


def main(arguments: list[str] | None = None) -> None:
    """Measure and report."""
    options = harness.options(__doc__, arguments, repeats=7)
    keep_freed_memory()  # as a run does
    compare_backends(options)
    compare_lengths(options)


def compare_backends(options: harness.Options) -> None:
    """Time and memory of every usable backend, against the reference."""
    shapes = TOY_SHAPES if options.quick else SHAPES
    cases = [(shape, dtype) for shape in shapes for dtype in (torch.float32, torch.bfloat16)]
    usable = dict.fromkeys(name for _, dtype in cases for name in backends(options.device, dtype))
    peaks = {name: harness.in_child(peaks_of, name, cases, options.device) for name in usable}
    rows: list[dict[str, harness.Cell]] = []
    for case, ((channels, lengths), dtype) in enumerate(cases):
        ways = {
            name: partial(scan_and_back, problem(channels, lengths, dtype, options.device), lengths, name)
            for name in backends(options.device, dtype)
        }
        timings = harness.interleave(ways, options.repeats)
        rows += [
            {
                "E": channels,
                "texts": f"{len(lengths)} x {lengths[0]}",
                "dtype": harness.short(dtype),
                "backend": name,
                **timing.cells(),
                "x reference": timings["reference"].over(timing),
                "peak MB": harness.megabytes(peaks[name][case]),
            }
            for name, timing in timings.items()
        ]
    notes = [f"N {STATES}, with skip connection and gate. Peak: without the inputs, with their gradients."]
    harness.report("scan", list(rows[0]), rows, notes, options)


def compare_lengths(options: harness.Options) -> None:
    """Time per token of one text of growing length, relative to the shortest text."""
    channels, lengths = (32, [8, 16]) if options.quick else (640, [512, 1024, 2048, 4096, 8192])
    names = [name for name in backends(options.device, torch.float32) if name != "reference"]
    ways = {
        f"{name}, {length} tokens": partial(
            scan_and_back, problem(channels, [length], torch.float32, options.device), [length], name
        )
        for name in names
        for length in lengths
    }
    timings = harness.interleave(ways, options.repeats)
    rows: list[dict[str, harness.Cell]] = []
    for name in names:
        shortest = timings[f"{name}, {lengths[0]} tokens"]
        for length in lengths:
            timing = timings[f"{name}, {length} tokens"]
            rows.append(
                {
                    "backend": name,
                    "tokens": length,
                    **timing.cells(),
                    "us a token": timing.median / length * 1e6,
                    "a token, relative": timing.over(shortest) * lengths[0] / length,
                }
            )
    notes = [f"E {channels}, N {STATES}, float32, one text. 1.00 at every length is linear time."]
    harness.report("scan_length", list(rows[0]), rows, notes, options)


def backends(device: torch.device, dtype: torch.dtype) -> list[str]:
    """The backends that support training on this device, fastest first."""
    return [name for name, obstacle in SCAN.obstacles(Task(device.type, dtype)).items() if obstacle is None]


def problem(channels: int, lengths: list[int], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Arguments of `selective_scan` that require gradients, with the dtypes that they have in a model."""
    generator = torch.Generator().manual_seed(0)
    tokens = sum(lengths)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()

    return {
        "u": normal(tokens, channels),
        "dt": normal(tokens, channels, dtype=torch.float32),
        "A": (-torch.arange(1.0, STATES + 1).expand(channels, -1)).to(device).requires_grad_(),
        "B": normal(tokens, STATES),
        "C": normal(tokens, STATES),
        "D": normal(channels),
        "z": normal(tokens, channels),
    }


def scan_and_back(inputs: dict[str, Tensor], lengths: list[int], backend: str) -> None:
    """Run forward, and backward to every input."""
    y, _ = selective_scan(**inputs, cu_seqlens=(0, *accumulate(lengths)), backend=backend)
    torch.autograd.grad(y, list(inputs.values()), y.detach())


def peaks_of(backend: str, cases: list[tuple[Shape, torch.dtype]], device: torch.device) -> list[int | None]:
    """Peak memory of a backend in each case; None if it does not support the case."""
    peaks: list[int | None] = []
    for (channels, lengths), dtype in cases:
        if backend not in backends(device, dtype):
            peaks.append(None)
            continue
        # First a small problem, so that memory for loading and compiling is not counted.
        scan_and_back(problem(16, [4], dtype, device), [4], backend)
        inputs = problem(channels, lengths, dtype, device)
        peaks.append(harness.peak_memory(partial(scan_and_back, inputs, lengths, backend), device))
    return peaks


if __name__ == "__main__":
    main()

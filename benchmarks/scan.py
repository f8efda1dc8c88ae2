"""The selective scan, forward and backward: its backends beside the plain recurrence, and time as texts grow.

"reference" goes through the tokens one by one and takes them apart with `unbind`; each backend's gain is over that.
A second table has one ever longer text: a token should cost as much in a long text as in a short one.
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
"""Channels, and the lengths of the texts."""
SHAPES: list[Shape] = [(640, [512] * 4), (3200, [512])]
TOY_SHAPES: list[Shape] = [(32, [8, 8])]


def main(arguments: list[str] | None = None) -> None:
    """Measure and report."""
    given = harness.options(__doc__, arguments, repeats=7)
    keep_freed_memory()  # as a run does
    compare_backends(given)
    compare_lengths(given)


def compare_backends(given: harness.Options) -> None:
    """Every backend that can, against the reference: time and memory."""
    shapes = TOY_SHAPES if given.quick else SHAPES
    cases = [(shape, dtype) for shape in shapes for dtype in (torch.float32, torch.bfloat16)]
    usable = dict.fromkeys(name for _, dtype in cases for name in backends(given.device, dtype))
    peaks = {name: harness.in_child(peaks_of, name, cases, given.device) for name in usable}
    rows: list[dict[str, harness.Cell]] = []
    for case, ((channels, lengths), dtype) in enumerate(cases):
        ways = {
            name: partial(scan_and_back, problem(channels, lengths, dtype, given.device), lengths, name)
            for name in backends(given.device, dtype)
        }
        timings = harness.interleave(ways, given.repeats)
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
    notes = [f"N {STATES}, with skip connection and gate. Peak: beyond the inputs, with their gradients."]
    harness.report("scan", list(rows[0]), rows, notes, given)


def compare_lengths(given: harness.Options) -> None:
    """One text of growing length: the time of a token, relative to the shortest text's."""
    channels, lengths = (32, [8, 16]) if given.quick else (640, [512, 1024, 2048, 4096, 8192])
    names = [name for name in backends(given.device, torch.float32) if name != "reference"]
    ways = {
        f"{name}, {length} tokens": partial(
            scan_and_back, problem(channels, [length], torch.float32, given.device), [length], name
        )
        for name in names
        for length in lengths
    }
    timings = harness.interleave(ways, given.repeats)
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
    notes = [f"E {channels}, N {STATES}, float32, one text. 1.00 for every length is linear time."]
    harness.report("scan_length", list(rows[0]), rows, notes, given)


def backends(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Those that can train here, the fastest first."""
    return [name for name, obstacle in SCAN.obstacles(Task(device.type, dtype)).items() if obstacle is None]


def problem(channels: int, lengths: list[int], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Arguments of `selective_scan` that ask for gradients, in the dtypes that a model gives them."""
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
    """Forward, and backward to every input."""
    y, _ = selective_scan(**inputs, cu_seqlens=(0, *accumulate(lengths)), backend=backend)
    torch.autograd.grad(y, list(inputs.values()), y.detach())


def peaks_of(backend: str, cases: list[tuple[Shape, torch.dtype]], device: torch.device) -> list[int | None]:
    """Peak memory of a backend in each case; None where it cannot."""
    peaks: list[int | None] = []
    for (channels, lengths), dtype in cases:
        if backend not in backends(device, dtype):
            peaks.append(None)
            continue
        # Once on a small problem, so that what is loaded or compiled on first use is not counted.
        scan_and_back(problem(16, [4], dtype, device), [4], backend)
        inputs = problem(channels, lengths, dtype, device)
        peaks.append(harness.peak_memory(partial(scan_and_back, inputs, lengths, backend), device))
    return peaks


if __name__ == "__main__":
    main()

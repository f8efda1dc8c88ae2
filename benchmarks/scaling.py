"""Training in several processes: time and memory against their number, the length of rows and the rows of a batch.

Each run is started through the command line, with ``--nproc`` where it has several processes. Rows are packed to their
full length, and each process has a batch of its own, so the work grows with the processes (weak scaling). ``tokens/s``
is that of all processes together, the median of the steps after the first two. ``x one`` compares it with one process.
Memory is the peak of the process that has most; ``estimated MB`` is known before the weights load. On a CPU each
process has the same number of cores in every run: those of the machine, divided by the largest number of processes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import harness
import torch

ROWS, LENGTHS = (4, 1, 8), (512, 256, 1024)
"""Rows in a batch of each process, and tokens of a row; one of them varies while the other is the first."""
STEPS, SKIPPED = 8, 2
"""Optimizer steps of a run, and those at its beginning that are not timed."""


@dataclass(frozen=True)
class Case:
    """A run.

    Attributes:
        strategy: What its processes share.
        processes: Their number.
        rows: The rows in a batch of each.
        length: The tokens of a row.
    """

    strategy: str
    processes: int
    rows: int
    length: int


@dataclass(frozen=True)
class Measured:
    """What a run took.

    Attributes:
        tokens_per_s: Tokens a second of all processes.
        peak: The peak bytes of the process that has most.
        estimated: The estimate of ``peak``.
    """

    tokens_per_s: float
    peak: int
    estimated: int


def main(arguments: list[str] | None = None) -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--model", default="hymba-nano", help="the model to train (default hymba-nano)")
    parser.add_argument("--processes", type=int, nargs="+", help="default: 1, 2, 4 ... as many as there are devices")
    parser.add_argument("--strategies", nargs="+", default=["ddp"], help="default: ddp")
    own, rest = parser.parse_known_args(arguments)
    options = harness.options(__doc__, rest, repeats=1)
    processes = own.processes or ([1, 2] if options.quick else powers_of_two(options.device))
    threads = str(max(1, cores() // max(processes)))
    environment = os.environ | ({"OMP_NUM_THREADS": threads} if options.device.type == "cpu" else {})
    rows: list[dict[str, harness.Cell]] = []
    with tempfile.TemporaryDirectory() as scratch:
        data = save_text(Path(scratch))
        alone: dict[tuple[int, int], Measured] = {}
        for dtype in options.dtypes[-1:]:
            flags = ["--model", own.model, "--dtype", harness.short(dtype), "--device", options.device.type]
            for case in cases(own.strategies, processes, quick=options.quick):
                measured = run(case, [*flags, "--data", str(data)], Path(scratch, "run"), environment)
                one = alone.setdefault((case.rows, case.length), measured)
                rows.append(row(case, measured, one, harness.short(dtype)))
    notes = [(__doc__ or "").partition("\n\n")[2].strip()]
    harness.report("scaling", list(rows[0]), rows, notes, options)


def powers_of_two(device: torch.device) -> list[int]:
    """Return 1, 2, 4 and so on, as far as there are GPUs, or cores."""
    devices = torch.cuda.device_count() if device.type == "cuda" else cores()
    return [2**power for power in range(devices.bit_length())]


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cases(strategies: list[str], processes: list[int], *, quick: bool) -> Iterator[Case]:
    """Yield the runs, one after the other of the same shape; that of the fewest processes first and only once."""
    shapes = (
        [(2, 64)] if quick else [(ROWS[0], length) for length in LENGTHS] + [(rows, LENGTHS[0]) for rows in ROWS[1:]]
    )
    for rows, length in shapes:
        for number in sorted(processes):
            for strategy in strategies if number > 1 else strategies[:1]:
                yield Case(strategy, number, rows, length)


def run(case: Case, flags: list[str], out: Path, environment: Mapping[str, str]) -> Measured:
    """Train with the settings of a case, and read what the run has recorded."""
    command = [sys.executable, "-m", "hymba_tune.cli", "sft", *flags, "--packing", "--eval-split", "0"]
    settings = {"batch-size": case.rows, "max-length": case.length, "steps": STEPS, "log-every": 1, "out": out}
    command += [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    if case.processes > 1:
        command += ["--nproc", str(case.processes), "--strategy", case.strategy]
    subprocess.run([*command, "--overwrite"], check=True, capture_output=True, env=environment)

    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    speeds = [line["tokens_per_s"] for line in metrics if "loss" in line][SKIPPED:]
    memory = json.loads((out / "run.json").read_text())["memory"]
    return Measured(median(speeds), memory["measured_bytes"], memory["predicted_bytes"])


def row(case: Case, measured: Measured, alone: Measured, dtype: str) -> dict[str, harness.Cell]:
    """Return the table's row of a case.

    Args:
        case: The case.
        measured: What it took.
        alone: What the same rows took in the fewest processes.
        dtype: The dtype of the computation.
    """
    return {
        "dtype": dtype,
        "strategy": case.strategy,
        "processes": case.processes,
        "rows": case.rows,
        "tokens a row": case.length,
        "tokens/s": measured.tokens_per_s,
        "x one": measured.tokens_per_s / alone.tokens_per_s,
        "step s": case.processes * case.rows * case.length / measured.tokens_per_s,
        "peak MB": harness.megabytes(measured.peak),
        "estimated MB": harness.megabytes(measured.estimated),
    }


def save_text(folder: Path) -> Path:
    """Save a file of texts that fill packed rows; their content does not matter."""
    path = folder / "text.jsonl"
    words = " ".join((Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8").split())
    path.write_text("".join(json.dumps({"text": words[start:]}) + "\n" for start in range(0, 4000, 10)))
    return path


if __name__ == "__main__":
    main()

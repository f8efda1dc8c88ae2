"""Check every backend on an NVIDIA GPU, and measure kernels, a training step of the released size, and generation.

    python benchmarks/gpu.py                     # everything, in 530 seconds
    python benchmarks/gpu.py --only parity scan  # sections by name
    python benchmarks/gpu.py --quick             # toy sizes, also on a CPU, to check that it runs
    python benchmarks/gpu.py --tables            # only the tables, from the rows that a run has written

It runs from a checkout with only torch, triton, transformers, peft and accelerate installed. What it measures is in
gpu.<machine>.jsonl as soon as it is known, so a run that is killed loses nothing; a section that fails or runs out of
its time does not stop the next.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import peft
import torch
import transformers
from gpu_decode import decode
from gpu_journal import Journal, last_run, read, report_tables
from gpu_kernels import attention, scan
from gpu_measure import OUT_OF_TIME, Bench, OutOfTimeError, alive, free, reason
from gpu_operations import operations, twin
from gpu_parity import parity
from gpu_profile import highest_clock
from gpu_step import long_step, nf4_step, step
from harness import HERE, Options
from rich.console import Console

from hymba_tune.model import use_kernels
from hymba_tune.model.backends import Task, survey

console = Console(highlight=False)


def card(bench: Bench) -> None:
    """Report the GPU, its limits, and which kernels the model uses on it."""
    facts: dict[str, str | float | None] = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }
    notes = ["limits as measured here; the other tables are relative to them"]
    with bench.table("card", ("fact", "value"), notes) as table:
        if bench.device.type == "cuda":
            properties, clock = torch.cuda.get_device_properties(bench.device), highest_clock(bench.device)
            facts["memory, GB"] = properties.total_memory / 1e9
            facts["multiprocessors"] = str(properties.multi_processor_count)
            facts["highest clock, MHz"] = None if clock is None else clock / 1e6
        facts["copy bandwidth, GB/s"] = bench.limits.bandwidth / 1e9
        facts["bf16 matmul, TFLOP/s"] = bench.limits.matmul / 1e12
        table.extend({"fact": fact, "value": value} for fact, value in facts.items())
        for what, gradients in (("training", True), ("generation", False)):
            task = Task(bench.device.type, torch.bfloat16, gradients, has_initial_state=not gradients)
            for operation, choice in survey(task).items():
                table.add({"fact": f"{operation} in {what}", "value": choice.taken})
                table.note(
                    *(f"{operation} in {what}: not {name}, {why}" for name, why in choice.obstacles.items() if why)
                )


class Section(NamedTuple):
    """A part of the benchmark.

    Attributes:
        run: Measures it.
        seconds: Its share of the time, of `SECONDS` in all. What it leaves goes to the sections after it.
    """

    run: Callable[[Bench], None]
    seconds: float


SECTIONS = {
    "card": Section(card, 20),
    "twin": Section(twin, 40),
    "scan": Section(scan, 40),
    "attention": Section(attention, 75),
    "step": Section(step, 50),
    "decode": Section(decode, 120),
    "nf4": Section(nf4_step, 50),
    "long": Section(long_step, 30),
    "operations": Section(operations, 30),
    "parity": Section(parity, 75),
}
"""In the order in which they run: what a first GPU has to show comes first, the longest list of checks last."""
SECONDS = sum(section.seconds for section in SECTIONS.values())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sections, and make the tables; returns 1 if anything failed or was wrong."""
    parsed = _read(arguments)
    device = torch.device(parsed.device)
    out = parsed.out or (parsed.tables.parent if parsed.tables else None if parsed.quick else HERE / "results")
    repeats = 1 if parsed.quick else parsed.repeats
    options = Options(parsed.quick, repeats, device, (torch.float32, torch.bfloat16), out)
    if parsed.tables is not None:
        report_tables(last_run(read(parsed.tables)), options)
        return 0
    use_kernels(**{operation: name for operation, _, name in (choice.partition("=") for choice in parsed.kernels)})
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)  # the one that is synchronized, timed and captured
        # Above its limit torch.compile stops compiling without an error; this process uses more shapes than a run.
        torch._dynamo.config.recompile_limit = 64
    journal = Journal.of(options)
    journal.continue_run() if parsed.continued else journal.begin(options)
    bench = Bench(options, time.monotonic() + parsed.seconds, journal)
    try:
        _run_all(bench, parsed)
    finally:
        if not parsed.continued:
            report_tables(journal.entries, options)
    for failure in bench.failures:
        console.print(f"failed: {failure}", markup=False)
    return 1 if bench.failures else 0


def _run_all(bench: Bench, parsed: argparse.Namespace) -> None:
    """Run the sections, the last of them in another process if the device cannot be used by this one any more."""
    begin, end = time.monotonic(), bench.deadline
    whole = sum(SECTIONS[name].seconds for name in parsed.only)
    due = 0.0
    for place, name in enumerate(parsed.only):
        due += SECTIONS[name].seconds
        bench.deadline = min(end, begin + parsed.seconds * due / whole)
        run(bench, name)
        if not alive(bench.device):
            # A kernel that faults makes the device unusable for this process, but not for the next.
            _run_elsewhere(parsed, parsed.only[place + 1 :], end)
            bench.journal.continue_run()
            break
        free()


def run(bench: Bench, name: str) -> None:
    """Run a section; an error is printed and recorded."""
    begin = time.monotonic()
    try:
        with _interrupted(bench.deadline):
            SECTIONS[name].run(bench)
    except OutOfTimeError as error:
        console.print(f"{name} was cut short: {error}", markup=False)
    except Exception as error:
        console.print_exception(max_frames=8)
        bench.fail(f"{name}: {reason(error)}")
    console.print(f"{name}: {time.monotonic() - begin:.0f} s\n")


GRACE = 5.0
"""Seconds that work which has begun in time may take longer."""


@contextmanager
def _interrupted(deadline: float) -> Iterator[None]:
    """Raise `OutOfTimeError` in work that goes on after a deadline, such as a compilation."""

    def stop(*_: object) -> None:
        raise OutOfTimeError(OUT_OF_TIME)

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(0.0, deadline - time.monotonic()) + GRACE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _read(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="sections to run (default: all)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="toy sizes, one round; results are written only with --out"
    )
    parser.add_argument("--repeats", type=int, default=10, help="maximum number of timed rounds (default 10)")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help=f"time for all sections, by their shares (default {SECONDS})"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: the GPU")
    parser.add_argument(
        "--kernels", nargs="+", default=[], metavar="OPERATION=BACKEND", help="kernels, as use_kernels accepts them"
    )
    parser.add_argument("--out", type=Path, help="folder for the results (default benchmarks/results)")
    parser.add_argument("--tables", type=Path, metavar="FILE", help="make the tables of a run from the rows it wrote")
    parser.add_argument("--continued", action="store_true", help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    if parsed.device == "cpu" and not parsed.quick and parsed.tables is None:
        parser.error("there is no GPU to measure; --quick runs on a CPU, with toy sizes")
    return parsed


def _run_elsewhere(parsed: argparse.Namespace, sections: Sequence[str], end: float) -> None:
    """Run sections in a new process, within the remaining time."""
    if not sections:
        return
    left = max(1.0, end - time.monotonic())
    command = [sys.executable, __file__, "--continued", "--seconds", str(left), "--repeats", str(parsed.repeats)]
    command += ["--device", parsed.device, *(["--quick"] if parsed.quick else []), "--only", *sections]
    command += ["--kernels", *parsed.kernels] if parsed.kernels else []
    command += ["--out", str(parsed.out)] if parsed.out else []
    subprocess.run(command, check=False)


if __name__ == "__main__":
    # A time limit's signal ends the section like an error, so that the tables are made.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())

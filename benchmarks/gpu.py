"""Check every backend on an NVIDIA GPU, and measure kernels, a training step of the released size, and generation.

    python benchmarks/gpu.py                     # everything, some minutes on a fast GPU
    python benchmarks/gpu.py --only parity scan  # sections by name
    python benchmarks/gpu.py --quick             # toy sizes, also on a CPU, to check that it runs

It runs from a checkout with only torch, triton, transformers, peft and rich installed. Each section writes its results
when it ends, also after an error; a section that fails does not stop the next.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import peft
import torch
import transformers
from gpu_decode import decode
from gpu_kernels import attention, scan
from gpu_measure import Bench, OutOfTimeError, alive, free, highest_clock, reason
from gpu_parity import parity
from gpu_step import step
from harness import HERE, Options
from rich.console import Console

from hymba_tune.model import use_kernels
from hymba_tune.model.backends import Task, survey

SHARES = {"parity": 0.35, "scan": 0.25, "attention": 0.25}
"""Maximum share of the time limit for a section; sections that are not listed may use all of the rest."""
console = Console(highlight=False)


def card(bench: Bench) -> None:
    """Report the GPU, its limits, and which kernels the model uses on it."""
    notes = ["limits as measured here; the other tables are relative to them"]
    facts: dict[str, str | float | None] = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }
    with bench.table("card", ("fact", "value"), notes) as rows:
        if bench.device.type == "cuda":
            properties, clock = torch.cuda.get_device_properties(bench.device), highest_clock(bench.device)
            facts["memory, GB"] = properties.total_memory / 1e9
            facts["multiprocessors"] = str(properties.multi_processor_count)
            facts["highest clock, MHz"] = None if clock is None else clock / 1e6
        facts["copy bandwidth, GB/s"] = bench.limits.bandwidth / 1e9
        facts["bf16 matmul, TFLOP/s"] = bench.limits.matmul / 1e12
        rows.extend({"fact": fact, "value": value} for fact, value in facts.items())
        for what, gradients in (("training", True), ("generation", False)):
            task = Task(bench.device.type, torch.bfloat16, gradients, has_initial_state=not gradients)
            for operation, choice in survey(task).items():
                rows.append({"fact": f"{operation} in {what}", "value": choice.taken})
                notes += [
                    f"{operation} in {what}: not {name}, {obstacle}" for name, obstacle in choice.obstacles.items()
                ]


SECTIONS = {"card": card, "parity": parity, "scan": scan, "attention": attention, "step": step, "decode": decode}
"""In the order in which they run: correctness before speed."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sections; returns 1 if anything failed or was wrong."""
    parsed = _read(arguments)
    device = torch.device(parsed.device)
    use_kernels(**{operation: name for operation, _, name in (choice.partition("=") for choice in parsed.kernels)})
    if device.type == "cuda":
        # Above its limit torch.compile stops compiling without an error; this process uses more shapes than a run.
        torch._dynamo.config.recompile_limit = 64
    out = parsed.out or (None if parsed.quick else HERE / "results")
    options = Options(parsed.quick, 1 if parsed.quick else parsed.repeats, device, (torch.float32, torch.bfloat16), out)
    end = time.monotonic() + 60 * parsed.minutes
    bench = Bench(options, end)
    for place, name in enumerate(parsed.only):
        bench.deadline = min(end, time.monotonic() + 60 * parsed.minutes * SHARES.get(name, 1))
        run(bench, name)
        if not alive(device):
            # A kernel that faults makes the device unusable for this process, but not for the next.
            _run_elsewhere(parsed, parsed.only[place + 1 :], end)
            break
        free()
    for failure in bench.failures:
        console.print(f"failed: {failure}", markup=False)
    return 1 if bench.failures else 0


def run(bench: Bench, name: str) -> None:
    """Run a section; an error is printed and recorded."""
    begin = time.monotonic()
    try:
        SECTIONS[name](bench)
    except OutOfTimeError as error:
        console.print(f"{name} was cut short: {error}", markup=False)
    except Exception as error:
        console.print_exception(max_frames=8)
        bench.failures.append(f"{name}: {reason(error)}")
    console.print(f"{name}: {time.monotonic() - begin:.0f} s\n")


def _read(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="sections to run (default: all)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="toy sizes, one round; results are written only with --out"
    )
    parser.add_argument("--repeats", type=int, default=10, help="maximum number of timed rounds (default 10)")
    parser.add_argument("--minutes", type=float, default=8, help="time after which nothing new is started (default 8)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: the GPU")
    parser.add_argument(
        "--kernels", nargs="+", default=[], metavar="OPERATION=BACKEND", help="kernels, as use_kernels accepts them"
    )
    parser.add_argument("--out", type=Path, help="folder for the results (default benchmarks/results)")
    parsed = parser.parse_args(arguments)
    if parsed.device == "cpu" and not parsed.quick:
        parser.error("there is no GPU to measure; --quick runs on a CPU, with toy sizes")
    return parsed


def _run_elsewhere(parsed: argparse.Namespace, sections: Sequence[str], end: float) -> None:
    """Run sections in a new process, within the remaining time."""
    if not sections:
        return
    left = (end - time.monotonic()) / 60
    command = [sys.executable, __file__, "--only", *sections, "--minutes", str(left), "--repeats", str(parsed.repeats)]
    command += ["--device", parsed.device, *(["--quick"] if parsed.quick else [])]
    command += ["--kernels", *parsed.kernels] if parsed.kernels else []
    command += ["--out", str(parsed.out)] if parsed.out else []
    subprocess.run(command, check=False)


if __name__ == "__main__":
    # A time limit's signal ends the section like an error, so that its rows are written.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())

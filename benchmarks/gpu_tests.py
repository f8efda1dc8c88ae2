"""Run the tests that need an NVIDIA GPU, within a time limit.

    python benchmarks/gpu_tests.py
    python benchmarks/gpu_tests.py --seconds 120 --out results

It needs pytest and hypothesis besides what gpu.py needs. Only files with such tests are read, because others import the
whole kit. Each line of pytest's is in gpu_tests.txt as soon as it is printed; at the limit pytest is asked to stop and
to sum up, and ended if it does not.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MARK = "@pytest.mark.gpu"
SECONDS = 240
GRACE = 15.0
"""Seconds that pytest has to sum up."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tests; returns pytest's exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"the limit (default {SECONDS})")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder for gpu_tests.txt")
    parsed = parser.parse_args(arguments)
    # Another machine's libraries may warn of what is no fault of ours, and its checkout may be read-only.
    words = ["-m", "gpu", "--verbose", "--tb=short", "-W", "default", "-p", "no:cacheprovider"]
    command = [sys.executable, "-u", "-m", "pytest", *words, *map(str, files())]
    return run(command, parsed.seconds, parsed.out / "gpu_tests.txt")


def files() -> list[Path]:
    """The files with tests that need a GPU."""
    return [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if MARK in path.read_text(encoding="utf-8")]


def run(command: Sequence[str], seconds: float, path: Path) -> int:
    """Run a command within a time limit, and copy its lines to a file as they come.

    Args:
        command: The command.
        seconds: After this time it is interrupted, and after `GRACE` more seconds it is killed.
        path: The file, which is written anew.

    Returns:
        The exit status; negative where a signal ended it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    timers = [
        threading.Timer(seconds, process.send_signal, [signal.SIGINT]),
        threading.Timer(seconds + GRACE, process.kill),
    ]
    for timer in timers:
        timer.start()
    assert process.stdout is not None
    with path.open("w", encoding="utf-8", buffering=1) as file, process.stdout as lines:
        for line in lines:
            file.write(line)
            sys.stdout.write(line)
            sys.stdout.flush()
    status = process.wait()
    for timer in timers:
        timer.cancel()
    return status


if __name__ == "__main__":
    sys.exit(main())

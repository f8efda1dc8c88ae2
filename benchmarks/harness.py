"""What every benchmark shares: its command line, timing, peak memory, and the report.

Rules: the ways to do a thing are timed in turn, so that a machine that slows down slows all of them; what is compared
is their ratio within one round; and every report carries the machine and the versions that it comes from.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, ParamSpec, TypeVar

import torch
import transformers
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hymba_tune.checkpoint import choose_device, choose_dtype

HERE = Path(__file__).parent
LIBRARIES = ("hymba-tune", "torch", "transformers", "triton", "mamba-ssm", "causal-conv1d", "flash-attn")
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")
"""Sets of a CPU that matter here, from least to most, under the names the Linux kernel gives them."""
LOAD_AT_START = os.getloadavg()[0]
SHORT = 0.5
"""Seconds that a call takes at most to be called short."""
WIDTH = 120
"""Columns of text where the output is no terminal."""
M_MMAP_THRESHOLD = -3
"""From glibc's malloc.h: blocks of at least so many bytes are pages of their own, returned when freed."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Cell = str | int | float | None
P = ParamSpec("P")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Options:
    """What the command line asks for.

    Attributes:
        quick: Toy sizes and one round, to see that it runs.
        repeats: Rounds that count.
        device: Where to measure.
        dtypes: Number formats to measure.
        out: Folder for the results, or None to only print them.
    """

    quick: bool
    repeats: int
    device: torch.device
    dtypes: tuple[torch.dtype, ...]
    out: Path | None


def options(description: str | None, arguments: Sequence[str] | None = None, *, repeats: int) -> Options:
    """Read the command line, and keep libraries' chatter out of the tables.

    Args:
        description: The benchmark's docstring.
        arguments: Those of the process when not given.
        repeats: How many rounds are worth their time.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="toy sizes, one round; written only if --out is given")
    parser.add_argument("--repeats", type=int, default=repeats, help=f"rounds that count (default {repeats})")
    parser.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="default: those the device computes in")
    parser.add_argument("--out", type=Path, help="folder for the results (default benchmarks/results)")
    given = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device = choose_device(given.device)
    default = dict.fromkeys((torch.float32, choose_dtype("auto", device)))
    return Options(
        quick=given.quick,
        repeats=1 if given.quick else given.repeats,
        device=device,
        dtypes=tuple(DTYPES[name] for name in given.dtype) if given.dtype else tuple(default),
        out=given.out or (None if given.quick else HERE / "results"),
    )


@dataclass(frozen=True)
class Timing:
    """How long something took, round by round, in seconds."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Of all rounds."""
        return median(self.rounds)

    @property
    def min(self) -> float:
        """The quickest round."""
        return min(self.rounds)

    @property
    def max(self) -> float:
        """The slowest round."""
        return max(self.rounds)

    def over(self, other: Timing) -> float:
        """How many times as long as another way of the same interleaving: the median of the rounds' ratios."""
        return median(own / others for own, others in zip(self.rounds, other.rounds, strict=True))

    def cells(self) -> dict[str, Cell]:
        """The columns ``ms``, ``min`` and ``max`` of a row, in milliseconds."""
        return {"ms": self.median * 1e3, "min": self.min * 1e3, "max": self.max * 1e3}


def interleave(ways: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 1) -> dict[str, Timing]:
    """Time several ways in turn: A B C A B C and so on.

    A short call is made twice and the second is timed: the first finds caches and memory as another way left them.

    Args:
        ways: What to call, by name. Calls should take a millisecond at least.
        repeats: Rounds that count.
        warmup: Rounds before them that do not.
    """
    rounds: dict[str, list[float]] = {name: [] for name in ways}
    with Console(stderr=True).status("") as status:
        for turn in range(-warmup, repeats):
            for name, way in ways.items():
                status.update(f"{name}, round {turn + 1} of {repeats}" if turn >= 0 else f"{name}, warming up")
                seconds = _time(way)
                if seconds < SHORT:
                    seconds = _time(way)
                if turn >= 0:
                    rounds[name].append(seconds)
    return {name: Timing(tuple(seconds)) for name, seconds in rounds.items()}


def _time(way: Callable[[], object]) -> float:
    _wait()
    start = time.perf_counter()
    way()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    """Until the device has done what it was given."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def in_child(function: Callable[P, Result], *args: P.args, **kwargs: P.kwargs) -> Result:
    """The result of a module's function in a process of its own, whose memory nothing has used before."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["hymba_tune.model"])
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(function, *args, **kwargs).result()


def peak_memory(work: Callable[[], object], device: torch.device) -> int | None:
    """Bytes held at the peak of some work beyond those held before it; None where that cannot be known.

    On CUDA these are PyTorch's allocations. On a CPU they are the process's resident pages, whose peak Linux can be
    told to forget: measure in a child (`in_child`), since pages that earlier work left behind are not counted again,
    and the allocator is told to give memory back at once, so that what was freed is not counted either.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    if platform.system() != "Linux":
        return None
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 16)
        libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    work()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0]) * 1024


def megabytes(count: int | None) -> float | None:
    """Bytes as 10^6 of them."""
    return None if count is None else count / 1e6


def short(dtype: torch.dtype) -> str:
    """``float32`` of ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


@cache
def machine() -> dict[str, Any]:
    """What results depend on beside the code: processor, GPU, versions, threads; and when they were made.

    Asked once: a GPU that a faulty kernel took down answers no more.
    """
    installed = {distribution.name.lower() for distribution in metadata.distributions() if distribution.name}
    versions = {name: metadata.version(name) for name in LIBRARIES if name in installed}
    return {
        "cpu": _cpu_model(),
        "cores": _cores(),
        "instructions": _instructions(),
        "gpu": _gpu() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "load_at_start": round(LOAD_AT_START, 2),
        "system": platform.system(),
        "versions": {"python": platform.python_version(), **versions},
        "date": time.strftime("%Y-%m-%d"),
        "commit": _output("git", "-C", str(HERE), "describe", "--always", "--dirty", "--exclude", "*"),
    }


def _cpu_model() -> str:
    names = re.search(r"^model name\s*:\s*(.+)$", _cpuinfo(), re.MULTILINE)
    return names[1].strip() if names else platform.processor() or platform.machine()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _instructions() -> list[str]:
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", _cpuinfo(), re.MULTILINE)
    return [name for name in INSTRUCTIONS if flags and name in flags[1].split()]


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.is_file() else ""


def _gpu() -> dict[str, str]:
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    return {
        "name": torch.cuda.get_device_name(),
        "capability": capability,
        "driver": (driver or "unknown").splitlines()[0],
        "cuda": str(torch.version.cuda),
    }


def _output(*command: str) -> str | None:
    """What a command prints, or None where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None if done.returncode == 0 else None


@cache
def slug(device: torch.device) -> str:
    """A short name of the machine, for files: that of its GPU if it is measured, else of its CPU."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        model = re.sub(r"\(\w+\)|@.*|\b(cpu|processor)\b", " ", _cpu_model(), flags=re.IGNORECASE)
        name = f"{model} {_cores()} cores {' '.join(_instructions()[-1:])}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def report(
    name: str, columns: Sequence[str], rows: Sequence[Mapping[str, Cell]], notes: Sequence[str], given: Options
) -> None:
    """Print a table, and write it with its machine to ``<name>.<machine>.json``.

    Args:
        name: Of the table.
        columns: In their order, with units.
        rows: Cells by column; a column that a row lacks stays empty.
        notes: What a reader has to know to read the numbers.
        given: The command line's.
    """
    facts = machine()
    where = facts["gpu"]["name"] if given.device.type == "cuda" else f"{facts['cpu']}, {facts['threads']} threads"
    table = Table(title=f"{name} · {where}", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        numeric = not any(isinstance(row.get(column), str) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(_shown(row.get(column)) for column in columns))
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    console.print(table, *map(escape, notes), sep="\n")
    if given.out is None:
        return
    result = {
        "name": name,
        "quick": given.quick,
        "repeats": given.repeats,
        "device": given.device.type,
        "machine": facts,
        "columns": list(columns),
        "rows": [{column: _rounded(row.get(column)) for column in columns} for row in rows],
        "notes": list(notes),
    }
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / f"{name}.{slug(given.device)}.json"
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    console.print(f"written to {path}")


def _shown(cell: Cell) -> str:
    """Three digits that say something, or all of a whole number."""
    if cell is None:
        return ""
    if not isinstance(cell, float):
        return f"{cell:,}" if isinstance(cell, int) else escape(cell)
    decimals = 0 if abs(cell) >= 100 else 1 if abs(cell) >= 10 else 2
    return f"{cell:,.{decimals}f}"


def _rounded(cell: Cell) -> Cell:
    return float(f"{cell:.5g}") if isinstance(cell, float) else cell

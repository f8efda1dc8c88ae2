"""The memory and speed of whole runs: estimated before the weights load, and measured.

Each run trains for two steps in a separate process, through the command line. The demo trains for 40 steps, because its
texts have many lengths and bfloat16 kernels are compiled for each. ``as usual`` is the peak of an ordinary run.
``given back`` is the peak of a run whose allocator returns freed memory to the system at once, which is what a step
needs: an allocator that keeps memory is faster, but the memory becomes fragmented. Speeds are tokens a second: by
`hymba-tune plan` on the same machine, and of the run's fastest step. A plan assumes rows of the maximum length.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import harness
import models

from hymba_tune.checkpoint import load_tokenizer
from hymba_tune.registry import resolve_model

NANO = ["--model", "hymba-nano"]
PACKED = ["--packing", "--batch-size", "4", "--max-length"]
MEDIUM = ["--model", "MEDIUM", "--data", "TEXT", "--dtype", "float32", *PACKED]
RUNS: dict[str, list[str]] = {
    "demo": ["--config", "demo", "--steps", "40"],
    "demo, float32": ["--config", "demo", "--steps", "40", "--dtype", "float32"],
    "demo, every weight": [*NANO, "--data", "demo", "--method", "full", "--dtype", "float32"],
    "as pretrain_nano": [*NANO, "--data", "TEXT", "--method", "full", "--dtype", "float32", *PACKED, "512"],
    "15.7M, LoRA": [*MEDIUM, "512"],
    "15.7M, every weight": [*MEDIUM, "512", "--method", "full"],
    "15.7M, checkpointing": [*MEDIUM, "512", "--gradient-checkpointing"],
    "15.7M, 1,024 tokens": [*MEDIUM, "1024"],
}
"""The flags of each run, by name; MEDIUM and TEXT are replaced by a model and a file that are created here."""
PROGRAM = [sys.executable, "-c", "from hymba_tune.cli.main import main; main()"]
COMMON = ["--eval-max-rows", "4", "--log-every", "1"]


def main(arguments: list[str] | None = None) -> None:
    """Measure and report."""
    options = harness.options(__doc__, arguments, repeats=1)
    names = list(RUNS)[:1] if options.quick else list(RUNS)
    rows: list[dict[str, harness.Cell]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        paths = {"MEDIUM": str(save_medium(folder)), "TEXT": str(save_text(folder))}
        for name in names:
            flags = [paths.get(word, word) for word in RUNS[name]]
            usual = run(folder / "usual", flags, os.environ)
            trimmed = run(folder / "trimmed", flags, {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"})
            planned = run_plan(flags)
            rows.append(
                {
                    "run": name,
                    "estimated MB": harness.megabytes(usual["predicted_bytes"]),
                    "as usual MB": harness.megabytes(usual["measured_bytes"]),
                    "estimated / usual": usual["predicted_bytes"] / usual["measured_bytes"],
                    "given back MB": harness.megabytes(trimmed["measured_bytes"]),
                    "estimated / given back": trimmed["predicted_bytes"] / trimmed["measured_bytes"],
                    "planned tokens/s": planned,
                    "tokens/s": usual["tokens_per_s"],
                    "planned / tokens/s": planned / usual["tokens_per_s"],
                }
            )
    harness.report("plan", list(rows[0]), rows, [(__doc__ or "").partition("\n\n")[2].strip()], options)


def run_plan(flags: list[str]) -> float:
    """Plan a run; returns the tokens a second on this machine."""
    words = ["plan", "--verb", "sft", *flags, "--json"]
    done = subprocess.run([*PROGRAM, *words], check=True, capture_output=True, text=True)
    speed: float = json.loads(done.stdout)["here"]["tokens_per_s"]
    return speed


def run(out: Path, flags: list[str], environment: Any) -> dict[str, float]:
    """Train a run; returns the estimated and measured memory from its run.json, and the speed of its fastest step."""
    command = [
        *PROGRAM,
        "sft",
        *flags,
        *([] if "--steps" in flags else ["--steps", "2"]),
        *COMMON,
        "--out",
        str(out),
    ]
    subprocess.run(command, check=True, capture_output=True, env=environment)
    memory: dict[str, float] = json.loads((out / "run.json").read_text())["memory"]
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    memory["tokens_per_s"] = max(line.get("tokens_per_s", 0.0) for line in lines)
    for path in sorted(out.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    return memory


def save_medium(folder: Path) -> Path:
    """Save the benchmarks' 15.7M model with the packaged tokenizer and its vocabulary."""
    path = folder / "medium"
    models.hymba(harness.choose_device("cpu"), harness.DTYPES["float32"], vocab_size=4096).save_pretrained(path)
    load_tokenizer(resolve_model("hymba-nano").folder).save_pretrained(path)
    return path


def save_text(folder: Path) -> Path:
    """Save a file of long texts; their content does not matter."""
    path = folder / "text.jsonl"
    words = " ".join((Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8").split())
    path.write_text("".join(json.dumps({"text": words[start:]}) + "\n" for start in range(0, 4000, 100)))
    return path


if __name__ == "__main__":
    main()

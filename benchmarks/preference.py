"""hymba-nano on GSM8K: supervised training on its solutions, then DPO on correct and wrong solutions.

The pairs are solutions to the test questions by the models of GSM8K's authors, a correct and a wrong one to the same
question. A quarter of these questions is held out of DPO. Supervised training uses the training questions only, and is
evaluated on the test questions. Only short rows are used, so that the benchmark takes minutes on one core. Each seed
selects another order, another adapter initialization and other rows.

    python benchmarks/preference.py --gsm8k FOLDER

FOLDER holds train.jsonl, test.jsonl and example_model_solutions.jsonl of github.com/openai/grade-school-math. Without
it, --quick runs on sums.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import harness

from hymba_tune.config import DPOConfig, SFTConfig
from hymba_tune.train.preference import run_dpo
from hymba_tune.train.run import Run
from hymba_tune.train.screen import Screen
from hymba_tune.train.sft import run_sft

SEEDS = 3
LONGEST = 600
"""Maximum length of a question and its solution together, in characters."""
HELD_OUT = 4
"""One test question in this many is held out of DPO."""

Rows = list[dict[str, str]]


@dataclass(frozen=True)
class Data:
    """Rows in the formats of `hymba-tune sft` and `hymba-tune dpo`."""

    solutions: Rows
    held_out_solutions: Rows
    pairs: Rows
    held_out_pairs: Rows


@dataclass(frozen=True)
class Size:
    """Numbers of steps, of training rows and of evaluation rows."""

    sft_steps: int
    dpo_steps: int
    solutions: int
    pairs: int
    evaluated: int


def main(arguments: list[str] | None = None) -> None:
    """Train, measure and report."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--gsm8k", type=Path)
    own, rest = parser.parse_known_args(arguments)
    options = harness.options(__doc__, rest, repeats=SEEDS)
    if own.gsm8k is None and not options.quick:
        parser.error("--gsm8k FOLDER is needed, or --quick")
    data = read(own.gsm8k) if own.gsm8k else sums()
    size = Size(2, 2, 8, 8, 4) if options.quick else Size(200, 100, 800, 400, 150)
    rows = [measure(data, size, seed, options) for seed in range(options.repeats)]
    numbers = [name for name in rows[0] if name != "seed"]
    rows.append({"seed": "mean"} | {name: mean(float(row[name] or 0.0) for row in rows) for name in numbers})
    notes = [
        f"Supervised: {size.sft_steps} steps of 4 rows, LoRA r16. DPO: {size.dpo_steps} steps of 4 pairs, beta 0.1, "
        f"from the supervised run. Held out: {size.evaluated} solutions and {size.evaluated} pairs of other questions.",
        "Loss in nats, per token and per pair; a pair whose answers are equally preferred has a loss of 0.693.",
    ]
    harness.report("preference", list(rows[0]), rows, notes, options)


def measure(data: Data, size: Size, seed: int, options: harness.Options) -> dict[str, harness.Cell]:
    """Run both trainings with one seed; returns their held-out metrics and their duration."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        rng = random.Random(seed)
        files = {
            "solutions": rng.sample(data.solutions, min(size.solutions, len(data.solutions))),
            "held_out_solutions": data.held_out_solutions[: size.evaluated],
            "pairs": rng.sample(data.pairs, min(size.pairs, len(data.pairs))),
            "held_out_pairs": data.held_out_pairs[: size.evaluated],
        }
        for name, rows in files.items():
            text = "".join(json.dumps(row) + "\n" for row in rows)
            Path(folder, f"{name}.jsonl").write_text(text, encoding="utf-8")
        sft, dpo = train(Path(folder), size, seed, options)
        before, after = evaluations(sft)
        first, last = evaluations(dpo)
    return {
        "seed": seed,
        "sft loss before": before["eval_loss"],
        "sft loss": after["eval_loss"],
        "dpo loss before": first["eval_loss"],
        "dpo loss": last["eval_loss"],
        "dpo accuracy": last["eval_accuracy"],
        "dpo margin": last["eval_margin"],
        "minutes": (time.perf_counter() - started) / 60,
    }


def train(folder: Path, size: Size, seed: int, options: harness.Options) -> tuple[Run, Run]:
    """Run supervised training, then DPO from its run."""
    shared: dict[str, Any] = {
        "dtype": str(options.dtypes[0]).removeprefix("torch."),
        "device": str(options.device),
        "seed": seed,
        "max_length": 512,
        "log_every": 10,
        "cache": False,
    }
    sft = SFTConfig(
        **shared,
        model="hymba-nano",
        data=[str(folder / "solutions.jsonl")],
        eval_data=[str(folder / "held_out_solutions.jsonl")],
        steps=size.sft_steps,
        eval_every=size.sft_steps,
        batch_size=4,
        lr=5e-3,
        out=folder / "sft",
    )
    run = run_sft(sft, Screen())
    dpo = DPOConfig(
        **shared,
        model=str(run.path),
        data=[str(folder / "pairs.jsonl")],
        eval_data=[str(folder / "held_out_pairs.jsonl")],
        steps=size.dpo_steps,
        eval_every=size.dpo_steps,
        batch_size=4,
        lr=1e-3,
        out=folder / "dpo",
    )
    return run, run_dpo(dpo, Screen())


def evaluations(run: Run) -> tuple[dict[str, Any], dict[str, Any]]:
    """The metrics of a run's first and last evaluations."""
    rows = [vars(row) for row in run.evaluations()]
    return rows[0], rows[-1]


def read(folder: Path) -> Data:
    """Read GSM8K's files as rows, in a fixed order."""
    solutions = {
        name: [
            {"prompt": row["question"], "completion": row["answer"].replace("\n#### ", "\nA: ")}
            for row in lines(folder / f"{name}.jsonl")
            if len(row["question"]) + len(row["answer"]) <= LONGEST
        ]
        for name in ("train", "test")
    }
    sides: tuple[Rows, Rows] = ([], [])
    for number, row in enumerate(lines(folder / "example_model_solutions.jsonl")):
        answers = [value for value in row.values() if isinstance(value, dict)]
        correct = [answer["solution"] for answer in answers if answer["is_correct"] is True]
        wrong = [answer["solution"] for answer in answers if answer["is_correct"] is False]
        sides[number % HELD_OUT == 0].extend(
            {"prompt": row["question"], "chosen": chosen, "rejected": rejected}
            for chosen, rejected in zip(correct, wrong, strict=False)
            if len(row["question"]) + max(len(chosen), len(rejected)) <= LONGEST
        )
    return Data(solutions["train"], solutions["test"], *sides)


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSON lines file."""
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def sums() -> Data:
    """Toy rows in the same formats."""
    solutions = []
    pairs = []
    for a in range(4):
        for b in range(4):
            prompt = f"What is {a} + {b}?"
            solutions.append({"prompt": prompt, "completion": f"A: {a + b}"})
            pairs.append({"prompt": prompt, "chosen": f"A: {a + b}", "rejected": f"A: {a + b + 1}"})
    return Data(solutions[4:], solutions[:4], pairs[4:], pairs[:4])


if __name__ == "__main__":
    main()

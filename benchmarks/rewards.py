"""hymba-nano on tasks with digits: a short supervised run, then GRPO from it, or more supervised training instead.

The tasks are to name the larger or the smaller of two digits. The supervised run learns them with answers in two forms,
"7" and "It is 7.". From it, GRPO trains on the same prompts with the reward `exact`, which only "7" has, and a second
supervised run on the right answers in this form for as many seconds of the processor. Held-out tasks are answered
greedily. Each seed selects other held-out tasks, another order and another initialization of the adapters.

    python benchmarks/rewards.py
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import harness

from hymba_tune.config import GRPOConfig, SFTConfig
from hymba_tune.train.grpo import run_grpo
from hymba_tune.train.run import Run
from hymba_tune.train.screen import MetricsRow, Screen
from hymba_tune.train.sft import run_sft

SEEDS = 3
GROUP = 8
"""Answers to each prompt of a step."""

Rows = list[dict[str, str]]


@dataclass(frozen=True)
class Size:
    """Numbers of steps, of held-out tasks, of answers in a step of GRPO; and what the numbers of tasks are below."""

    sft_steps: int
    grpo_steps: int
    held_out: int
    answers: int
    largest: int


class Clock(Screen):
    """Records the seconds of the processor at each row of training metrics."""

    def __init__(self) -> None:
        self._times: list[tuple[int, float]] = []

    def row(self, row: MetricsRow, *, total_steps: int, seconds_left: float | None) -> None:
        """Record a row."""
        del total_steps, seconds_left
        if row.loss is not None:
            self._times.append((row.step, time.process_time()))

    @property
    def step(self) -> float:
        """The seconds of a step."""
        (first, started), *_, (last, ended) = self._times
        return (ended - started) / (last - first)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, measure and report."""
    options = harness.options(__doc__, arguments, repeats=SEEDS)
    size = Size(2, 2, 4, 16, 5) if options.quick else Size(160, 60, 50, 64, 10)
    rows = [measure(size, seed, options) for seed in range(options.repeats)]
    numbers = [name for name in rows[0] if name != "seed"]
    rows.append({"seed": "mean"} | {name: mean(float(row[name] or 0.0) for row in rows) for name in numbers})
    notes = [
        f"Supervised: {size.sft_steps} steps of 16 rows, LoRA r16. GRPO from it: {size.grpo_steps} steps "
        f"of {size.answers} answers in groups of {GROUP}. Supervised again: for as many CPU seconds.",
        f"exact %: of {size.held_out} held-out tasks, answered greedily. sampled %: of the answers that GRPO sampled "
        "in the first and in the last tenth of its steps.",
    ]
    harness.report("rewards", list(rows[0]), rows, notes, options)


def measure(size: Size, seed: int, options: harness.Options) -> dict[str, harness.Cell]:
    """Run the three trainings with one seed."""
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder), size, seed)
        shared: dict[str, Any] = {
            "dtype": str(options.dtypes[0]).removeprefix("torch."),
            "device": str(options.device),
            "data": [f"{folder}/train.jsonl"],
            "eval_data": [f"{folder}/held_out.jsonl"],
            "seed": seed,
            "max_length": 64,
            "cache": False,
        }
        both = {**shared, "data": [f"{folder}/both_forms.jsonl"]}
        start, first = supervised(both, "hymba-nano", size.sft_steps, Path(folder, "sft"))
        grpo, clock = rewarded(shared, start, size, Path(folder, "grpo"))
        seconds = size.grpo_steps * clock.step
        steps = max(2, round(seconds / first.step))
        again, _ = supervised(shared, str(start.path), steps, Path(folder, "again"))
        sampled = [row.more["reward"] for row in grpo.rows() if "reward" in row.more]
        few = max(1, len(sampled) // 10)
        return {
            "seed": seed,
            "exact %": percent(start),
            "exact %, grpo": 100 * list(grpo.evaluations())[-1].more["eval_reward"],
            "exact %, sft again": percent(again),
            "sampled %": 100 * mean(sampled[:few]),
            "sampled %, grpo": 100 * mean(sampled[-few:]),
            "grpo steps": size.grpo_steps,
            "sft steps": steps,
            "cpu s": seconds,
        }


def supervised(shared: dict[str, Any], model: str, steps: int, out: Path) -> tuple[Run, Clock]:
    """Train on the right answers."""
    clock = Clock()
    config = SFTConfig(
        **shared,
        model=model,
        answers="exact",
        steps=steps,
        eval_every=steps,
        log_every=1,
        batch_size=16,
        lr=5e-3,
        out=out,
    )
    run = run_sft(config, clock)
    assert run is not None
    return run, clock


def rewarded(shared: dict[str, Any], start: Run, size: Size, out: Path) -> tuple[Run, Clock]:
    """Train from rewards of sampled answers."""
    clock = Clock()
    config = GRPOConfig(
        **shared,
        model=str(start.path),
        reward=["exact"],
        group_size=GROUP,
        batch_size=size.answers,
        grad_accum=1,
        max_new_tokens=8,
        steps=size.grpo_steps,
        eval_every=size.grpo_steps,
        eval_max_rows=size.held_out,
        log_every=1,
        lr=1e-3,
        lr_schedule="constant",
        out=out,
    )
    run = run_grpo(config, clock)
    assert run is not None
    return run, clock


def percent(run: Run) -> float:
    """The share of held-out tasks that a supervised run ends with the right answers to."""
    answers = run.facts()["answers"]
    return 100 * float(answers["after"]) / float(answers["questions"])


def save(folder: Path, size: Size, seed: int) -> None:
    """Write the tasks, in an order that depends on the seed; the first are held out."""
    tasks: Rows = [
        {"prompt": f"Which is {word}, {a} or {b}?", "completion": str(chosen(a, b))}
        for word, chosen in (("larger", max), ("smaller", min))
        for a in range(size.largest)
        for b in range(size.largest)
        if a != b
    ]
    random.Random(seed).shuffle(tasks)
    parts = {"held_out": tasks[: size.held_out], "train": tasks[size.held_out :]}
    sentences = [task | {"completion": f"It is {task['completion']}."} for task in parts["train"]]
    parts["both_forms"] = parts["train"] + sentences
    for name, rows in parts.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

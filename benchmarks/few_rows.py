"""hymba-nano on few rows of three invented data sets: the defaults by model size against the released model's.

The data sets are questions about the shops of a town (facts in other words), messages to sort by team (one word), and
orders to write as a line of fields (a form). Held-out rows are worded differently from all training rows. Each seed
draws other rows, another order and another adapter initialization.

    python benchmarks/few_rows.py
    python benchmarks/few_rows.py --rows 50 --repeats 1
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean
from typing import Any

import harness

from hymba_tune.config import SFTConfig
from hymba_tune.train.run import Run
from hymba_tune.train.screen import Screen
from hymba_tune.train.sft import run_sft

SEEDS = 3
ROWS = (20, 50, 200, 1360)
HELD_OUT = 16
SETTINGS: dict[str, dict[str, Any]] = {"released model's": {"lr": 2e-4, "epochs": 1.0}, "by size": {}}
"""The defaults that are compared: those of the released model, and those that a small model has."""

Rows = list[dict[str, str]]

SHOPS = ("bakery", "library", "post office", "bank", "museum", "pool", "market", "cinema", "pharmacy", "garden")
QUESTIONS = ("When does the {} open?", "What time does the {} open?", "At what hour can I visit the {}?")
QUESTIONS += ("How early is the {} open?", "The {}: when does it open?", "From when on is the {} open?")
BEFORE = ("", "Hello. ", "Please tell me: ", "One question. ", "Good morning! ", "Excuse me, ", "I am new here. ")
AFTER = ("", " Thank you.", " I want to go there today.", " My friend asks.", " I am in a hurry.", " Thanks a lot!")
TEAMS = {
    "billing": ("I was charged twice", "my invoice is wrong", "the price on my bill is too high", "I paid too much"),
    "delivery": ("my parcel is late", "the package never came", "where is my order", "the courier was not here"),
    "returns": ("I want to send it back", "it does not fit", "I would like a refund", "please take the shoes back"),
    "technical": ("the app crashes", "I cannot log in", "the page does not load", "my password does not work"),
}
ITEMS = ("tea", "bread", "soap", "paper", "honey", "rice", "salt", "milk")
PEOPLE = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana")
ORDERS = ("{n} {item} for {name}", "Send {name} {n} {item}", "{name} wants {n} {item}", "Order {n} {item} for {name}")


def shops(rng: random.Random) -> tuple[str, str]:
    """Return a question about the opening hours of a shop, and its answer."""
    number = rng.randrange(len(SHOPS))
    question = rng.choice(BEFORE) + rng.choice(QUESTIONS).format(SHOPS[number]) + rng.choice(AFTER)
    return question, f"The {SHOPS[number]} opens at {(7 * number + 3) % 11 + 6}."


def teams(rng: random.Random) -> tuple[str, str]:
    """Return a customer's message, and the team that it belongs to."""
    team = rng.choice(list(TEAMS))
    text = rng.choice(TEAMS[team])
    return f"Which team? {rng.choice(BEFORE)}{text[0].upper()}{text[1:]}.{rng.choice(AFTER)}", team


def orders(rng: random.Random) -> tuple[str, str]:
    """Return an order in words, and as fields."""
    fields: dict[str, Any] = {"n": rng.randint(2, 9), "item": rng.choice(ITEMS), "name": rng.choice(PEOPLE)}
    text = rng.choice(BEFORE) + rng.choice(ORDERS).format(**fields) + rng.choice(AFTER)
    return text, "item: {item}; count: {n}; name: {name}".format(**fields)


DATA: dict[str, Callable[[random.Random], tuple[str, str]]] = {"shops": shops, "teams": teams, "orders": orders}


def main(arguments: list[str] | None = None) -> None:
    """Train, measure and report."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    own, rest = parser.parse_known_args(arguments)
    options = harness.options(__doc__, rest, repeats=SEEDS)
    sizes = [8] if options.quick else own.rows
    names = list(DATA)[:1] if options.quick else list(DATA)
    rows = [
        {"data": name, "rows": size, "defaults": label}
        | _means([measure(name, size, seed, settings, options) for seed in range(options.repeats)])
        for name in names
        for size in sizes
        for label, settings in SETTINGS.items()
    ]
    notes = [f"Means over {options.repeats} seeds, each on {HELD_OUT} held-out rows. LoRA r16, batches of 8 rows."]
    harness.report("few_rows", list(rows[0]), rows, notes, options)


def measure(name: str, size: int, seed: int, settings: dict[str, Any], options: harness.Options) -> dict[str, float]:
    """Train on some rows of a data set with one seed; returns the held-out loss, the right answers and the steps."""
    with tempfile.TemporaryDirectory() as folder:
        train, held_out = draw(name, size, 2 if options.quick else HELD_OUT, seed)
        for file, rows in (("train", train), ("held_out", held_out)):
            Path(folder, f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        started = time.process_time()
        run = fit(Path(folder), seed, settings, options)
        seconds = time.process_time() - started
        first, *_, last = run.evaluations()
        answers = run.facts()["answers"]
        return {
            "loss before": first.eval_loss or 0.0,
            "loss": last.eval_loss or 0.0,
            "right %": 100 * answers["after"] / answers["questions"],
            "steps": last.step,
            "cpu s": seconds,
        }


def draw(name: str, size: int, held_out: int, seed: int) -> tuple[Rows, Rows]:
    """Draw training rows, which may repeat, and held-out rows whose prompts are not among them."""
    rng = random.Random(f"{name} {seed}")
    apart: dict[str, str] = {}
    while len(apart) < held_out:
        question, answer = DATA[name](rng)
        apart[question] = answer
    train: list[tuple[str, str]] = []
    while len(train) < size:
        row = DATA[name](rng)
        train += [row] if row[0] not in apart else []
    return _as_rows(train), _as_rows(apart.items())


def _as_rows(pairs: Iterable[tuple[str, str]]) -> Rows:
    return [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]


def fit(folder: Path, seed: int, settings: dict[str, Any], options: harness.Options) -> Run:
    """Run supervised training with the given defaults, evaluated before and after it only."""
    run = run_sft(
        SFTConfig(
            **settings,
            dtype=str(options.dtypes[0]).removeprefix("torch."),
            device=str(options.device),
            model="hymba-nano",
            data=[str(folder / "train.jsonl")],
            eval_data=[str(folder / "held_out.jsonl")],
            answers="exact",
            seed=seed,
            eval_every=10**6,
            cache=False,
            out=folder / "run",
        ),
        Screen(),
    )
    assert run is not None
    return run


def _means(runs: list[dict[str, float]]) -> dict[str, harness.Cell]:
    return {name: mean(run[name] for run in runs) for name in runs[0]}


if __name__ == "__main__":
    main()

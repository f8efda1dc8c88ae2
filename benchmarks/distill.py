"""Distillation from a teacher with another tokenizer: every method, and ablations of the projection.

Two teachers are trained here on the same texts. They differ only in their tokenizers: one has its own, byte-level and
larger, the other has the student's. hymba-nano is then trained further for the same number of steps with each method,
at three learning rates; the best of these on the first seed is used with all seeds. The held-out data are GSM8K's test
questions and tasks with digits. "way" is the share of the improvement from cross-entropy (0 %) to the teacher with the
student's tokenizer (100 %).

    python benchmarks/distill.py --gsm8k FOLDER [--work FOLDER] [--teacher-only] [--processes N]

FOLDER holds train.jsonl and test.jsonl of github.com/openai/grade-school-math; --quick runs without it. Finished parts
are stored in --work and not repeated. The teacher in --work/teacher can be used with `hymba-tune distill --teacher`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import distill_losses as targets
import distill_students as students
import distill_teachers as teachers
import distill_texts as texts
import harness
import torch
from distill_losses import Setting
from distill_students import Method

from hymba_tune.distill.projection import SparseTarget
from hymba_tune.distill.targets import Targets

SEEDS = 3
RATES = (1.5e-3, 3e-3, 6e-3)
PROJECTION = Setting()
METHODS = {
    "cross-entropy": Method("ce"),
    "sorted ULD": Method("uld", PROJECTION),
    "chunk likelihood": Method("alm", PROJECTION),
    "projection": Method("projection", PROJECTION),
    "projection, first tokens alone": Method("projection", Setting(in_context=False)),
    "projection, no second cover": Method("projection", Setting(second_cover=False)),
    "projection, no rest mass": Method("projection", Setting(rest_mass=False)),
    "projection, none of the three": Method(
        "projection", Setting(in_context=False, second_cover=False, rest_mass=False)
    ),
    "projection + chunks": Method("projection+alm", PROJECTION),
    "sequence-level": Method("ce", teacher_answers=True),
    "same tokenizer": Method("kl", Setting(twin=True)),
}
BITS = "mbit a byte"
FLOOR, CEILING = "cross-entropy", "same tokenizer"
AROUND = {
    "k 16": {"k": 16},
    "k 64": {"k": 64},
    "alpha 0.5": {"alpha": 0.5},
    "alpha 0.9": {"alpha": 0.9},
    "alpha 1": {"alpha": 1.0},
    "temperature 0.7": {"temperature": 0.7},
    "temperature 2": {"temperature": 2.0},
}
"""The changes to the best method."""
LONGER = 8
"""Factor of the number of steps in the longer runs, in which the digit tasks are learned."""
RIVAL = "chunk likelihood"
"""The method that has longer runs too, besides cross-entropy, the best method and the ceiling."""


@dataclass(frozen=True)
class Size:
    """The sizes of models, runs and data.

    Attributes:
        body: Sizes of the teachers, for a `LlamaConfig`.
        teacher_steps: Steps of the teacher's two stages.
        twin_steps: Steps of the twin's two stages: more, because its tokens are shorter and it must be as good.
        steps: Steps of a student's run.
        answer_tokens: Maximum number of tokens of a generated answer.
        counts: Numbers of rows.
    """

    body: dict[str, int]
    teacher_steps: tuple[int, int]
    twin_steps: tuple[int, int]
    steps: int
    answer_tokens: int
    counts: texts.Counts


FULL = Size(teachers.FULL, (1250, 550), (1700, 1400), 120, 160, texts.FULL)
QUICK = Size(teachers.QUICK, (1, 1), (1, 1), 2, 4, texts.QUICK)
LEARNING_RATES = (1.5e-3, 1e-3)
"""Learning rates of the teachers' two stages."""


@dataclass(frozen=True)
class Task:
    """One run; with ``generates`` the student also generates, which is slow; ``times`` is a factor of the steps."""

    name: str
    method: Method
    lr: float
    seed: int
    generates: bool
    times: int = 1

    @property
    def key(self) -> str:
        """The run's key in the list of finished runs."""
        return f"{self.name}, {self.lr:g}, seed {self.seed}"


@dataclass(frozen=True)
class Bench:
    """The folder of a benchmark, its data and its sizes."""

    work: Path
    texts: texts.Texts
    size: Size

    def teacher(self, *, twin: bool) -> Path:
        """The folder of a teacher, which is trained if it does not exist."""
        folder = self.work / ("twin" if twin else "teacher")
        if not (folder / "config.json").is_file():
            general, subject = self.texts.teacher()
            if twin:
                tokenizer = teachers.twin_tokenizer()
            else:
                tokenizer = teachers.train_tokenizer(map(teachers.plain_text, general), teachers.VOCABULARY)
            steps = self.size.twin_steps if twin else self.size.teacher_steps
            parts = zip((general, subject), steps, LEARNING_RATES, strict=True)
            teachers.train(tokenizer, [teachers.Stage(*part) for part in parts], self.size.body, folder)
        return folder

    def rows(self, method: Method) -> list[targets.StudentRow]:
        """The training rows of a method, which are prepared if they do not exist."""
        with torch.serialization.safe_globals([targets.StudentRow, Targets, SparseTarget]):
            rows: list[targets.StudentRow] = torch.load(self.prepare_rows(method), weights_only=True)
        return rows

    def prepare_rows(self, method: Method) -> Path:
        """The file of a method's training rows, which is written if it does not exist."""
        name = _name(method)
        path = self.work / "rows" / f"{name}.pt"
        if path.is_file():
            return path
        teachers.console.print(f"rows: {name}")
        path.parent.mkdir(parents=True, exist_ok=True)

        examples = self.texts.student()
        if method.teacher_answers:
            examples = targets.with_teacher_answers(examples, self.teacher(twin=False), self.size.answer_tokens)
        if method.setting is None:
            rows = targets.plain_rows(examples)
        else:
            rows = targets.rows_with_targets(examples, self.teacher(twin=method.setting.twin), method.setting)
        torch.save(rows, path)
        return path


def _name(method: Method) -> str:
    if method.teacher_answers:
        return "teacher-answers"
    if method.setting is None:
        return "plain"
    return "-".join(f"{name}={value}" for name, value in asdict(method.setting).items())


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, measure and report."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--gsm8k", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--teacher-only", action="store_true")
    parser.add_argument("--processes", type=int, default=1)
    own, rest = parser.parse_known_args(arguments)
    options = harness.options(__doc__, rest, repeats=SEEDS)
    if own.gsm8k is None and not options.quick:
        parser.error("--gsm8k FOLDER is needed, or --quick")
    with tempfile.TemporaryDirectory() as folder:
        size = QUICK if options.quick else FULL
        bench = Bench(own.work or Path(folder), texts.Texts(own.gsm8k, size.counts), size)
        if own.teacher_only:
            bench.teacher(twin=False)
            return
        methods = {name: METHODS[name] for name in (FLOOR, "projection", CEILING)} if options.quick else METHODS
        around = dict(list(AROUND.items())[: 1 if options.quick else None])
        rates = RATES[:1] if options.quick else RATES
        runs = Runs(bench, own.processes)
        seeds = range(options.repeats)
        runs.do([Task(name, method, lr, 0, len(seeds) == 1) for name, method in methods.items() for lr in rates])
        best = {name: min(rates, key=lambda lr: runs.of(name, lr)[0]["all"]) for name in methods}
        runs.do([Task(name, methods[name], best[name], seed, True) for seed in seeds for name in methods])
        report_methods(runs, best, options)

        others = [name for name in methods if name not in (FLOOR, CEILING)]
        winner = min(others, key=lambda name: mean(run["all"] for run in runs.of(name, best[name])))
        changed = {f"{winner}, {name}": change(methods[winner], facts) for name, facts in around.items()}
        rate = best[winner]
        runs.do([Task(name, method, rate, seed, False) for seed in seeds for name, method in changed.items()])
        report_around(runs, [winner, *changed], rate, options)

        longer = {f"{name}, longer": name for name in (FLOOR, RIVAL, winner, CEILING) if name in methods}
        times = 2 if options.quick else LONGER
        runs.do([Task(key, methods[n], best[n], seed, True, times) for seed in seeds for key, n in longer.items()])
        report_longer(runs, {key: best[name] for key, name in longer.items()}, options)
        report_teachers(bench, options)


def change(method: Method, fields: dict[str, Any]) -> Method:
    """A method with some of its fields, or its setting's, changed."""
    if "temperature" in fields:
        return replace(method, setting=replace(method.setting, **fields))
    return replace(method, **fields)


class Runs:
    """The finished runs; runs further ones."""

    def __init__(self, bench: Bench, processes: int) -> None:
        self.bench = bench
        self.processes = processes
        self.path = bench.work / "runs.jsonl"
        self.finished: dict[str, dict[str, Any]] = {}
        if self.path.is_file():
            rows = map(json.loads, self.path.read_text(encoding="utf-8").splitlines())
            self.finished = {row["key"]: row for row in rows}

    def of(self, name: str, lr: float) -> list[dict[str, float]]:
        """The measurements of a method's runs, by seed."""
        rows = [row for row in self.finished.values() if (row["name"], row["lr"]) == (name, lr)]
        return [row["measured"] for row in sorted(rows, key=lambda row: int(row["seed"]))]

    def do(self, tasks: Sequence[Task]) -> None:
        """Run the tasks that are not finished."""
        missing = [task for task in tasks if task.key not in self.finished]
        if self.processes == 1:
            for task in missing:
                self._record(run(self.bench, task))
            return
        with ProcessPoolExecutor(self.processes, get_context("spawn")) as pool:
            futures = []
            for task in missing:
                self.bench.prepare_rows(task.method)  # in this process, so that no two processes prepare the same ones
                futures.append(pool.submit(run, self.bench, task))
                futures[-1].add_done_callback(lambda finished: self._record(finished.result()))
            for future in futures:
                future.result()

    def _record(self, row: dict[str, Any]) -> None:
        self.finished[row["key"]] = row
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        bits = row["measured"]["all"]
        teachers.console.print(f"{row['key']}: {bits:.4f} bits per byte, {row['seconds']:.0f} s")


def run(bench: Bench, task: Task) -> dict[str, Any]:
    """Train and measure one student."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    rows = bench.rows(task.method)
    head = None
    if task.method.loss in ("uld", "kl"):
        head = targets.load(bench.teacher(twin=task.method.setting.twin))[0].get_output_embeddings().weight.detach()
    student = students.train(rows, task.method, task.lr, task.seed, bench.size.steps * task.times, head)
    training_seconds = time.perf_counter() - start

    held_out = bench.texts.held_out()
    measured = students.bits_per_byte(student, held_out, students.nano()[1])
    if task.generates:
        teacher = bench.teacher(twin=False)
        measured |= students.generation_metrics(student, held_out, teacher, bench.size.answer_tokens)
    seconds = time.perf_counter() - start
    facts = {"name": task.name, "lr": task.lr, "seed": task.seed, "seconds": seconds, "trained": training_seconds}
    return {"key": task.key, **facts, "measured": measured}


def report_methods(runs: Runs, best: dict[str, float], options: harness.Options) -> None:
    """Report every method at its best learning rate."""
    base = runs.of(FLOOR, best[FLOOR])
    rows = [cells(name, runs.of(name, lr), lr, base) for name, lr in best.items()]
    by_name = {row["loss"]: row[BITS] for row in rows}
    for row in rows:
        row["way %"] = 100 * (by_name[FLOOR] - row[BITS]) / (by_name[FLOOR] - by_name[CEILING])
    size = runs.bench.size
    notes = [
        f"{size.steps} steps of {students.STEP_TOKENS} tokens, all weights, AdamW, {len(RATES)} learning rates "
        f"({', '.join(f'{rate:g}' for rate in RATES)}); the best on the first seed.",
        "mbit a byte: millibits per byte of held-out answers, all and by kind. change: from the first row with the "
        "same seeds, which give every method the same rows in the same order; +- is its standard deviation.",
        "chunks: likelihoods of the smallest spans with common boundaries, where the projection has no target.",
        "way: from cross-entropy (0 %) to the teacher with the same tokenizer (100 %). exact: digit tasks answered "
        "exactly. teacher's: the teacher's mbit a byte of GSM8K answers that the student samples. Both are without the "
        "first seed.",
    ]
    columns = ["loss", "lr", BITS, "change", "+-", "way %", *runs.bench.texts.held_out(), "exact %", "teacher's"]
    harness.report("distill", columns, rows, notes, options)


def report_around(runs: Runs, names: Sequence[str], lr: float, options: harness.Options) -> None:
    """Report the best method with one field changed."""
    base = runs.of(names[0], lr)
    rows = [cells(name, runs.of(name, lr), lr, base) for name in names]
    notes = [f"The first row has k {Method.k}, alpha {Method.alpha} and temperature 1; all use its learning rate."]
    harness.report("distill_around", list(rows[-1]), rows, notes, options)


def report_longer(runs: Runs, rates: dict[str, float], options: harness.Options) -> None:
    """Report the main methods with more steps."""
    base = runs.of(f"{FLOOR}, longer", rates[f"{FLOOR}, longer"])
    rows = [cells(name, runs.of(name, lr), lr, base) for name, lr in rates.items()]
    notes = [f"{LONGER * runs.bench.size.steps} steps, at the best learning rate for {runs.bench.size.steps}."]
    harness.report("distill_longer", list(rows[0]), rows, notes, options)


def cells(
    name: str, measured: Sequence[dict[str, float]], lr: float, base: Sequence[dict[str, float]]
) -> dict[str, Any]:
    """A row of the table: means over the seeds, in millibits; ``base`` has the first row's measurements."""
    means = {key: mean(run[key] for run in measured if key in run) for key in measured[-1]}
    differences = [1000 * (run["all"] - other["all"]) for run, other in zip(measured, base, strict=False)]
    kinds = {kind: 1000 * means[kind] for kind in means if kind not in ("all", "exact", "teacher")}
    return {
        "loss": name,
        "lr": f"{lr:g}",
        "seeds": len(measured),
        BITS: 1000 * means["all"],
        "change": mean(differences),
        "+-": stdev(differences) if len(differences) > 1 else 0.0,
        **kinds,
        **({"exact %": 100 * means["exact"], "teacher's": 1000 * means["teacher"]} if "exact" in means else {}),
    }


def report_teachers(bench: Bench, options: harness.Options) -> None:
    """Report the teachers, and hymba-nano as it is packaged."""
    held_out = bench.texts.held_out()
    models = {
        "teacher": targets.load(bench.teacher(twin=False)),
        "same tokenizer": targets.load(bench.teacher(twin=True)),
        "student": students.nano(),
    }
    rows = []
    for name, (model, tokenizer) in models.items():
        measured = students.bits_per_byte(model, held_out, tokenizer)
        bits = {BITS: 1000 * measured.pop("all")} | {kind: 1000 * value for kind, value in measured.items()}
        rows.append({"model": name, "parameters": model.num_parameters(), "vocabulary": len(tokenizer), **bits})
    notes = ["Millibits per byte of held-out answers; the student as it is packaged."]
    harness.report("distill_teachers", list(rows[0]), rows, notes, options)


if __name__ == "__main__":
    main()

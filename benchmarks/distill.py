"""What a student learns from a teacher whose tokenizer differs, by every way there is, and by its parts.

Two teachers are trained here on the same texts, alike but for their tokenizers: one of its own, byte-level and larger,
and the student's. hymba-nano then goes on learning for the same steps in each way, at three learning rates; the best of
these on the first seed counts, with all seeds. Held out are GSM8K's test questions and tasks with digits. "way" is how
far a loss comes from cross-entropy (0 %) to the same tokenizer's teacher (100 %).

    python benchmarks/distill.py --gsm8k FOLDER [--work FOLDER] [--teacher-only] [--processes N]

FOLDER holds train.jsonl and test.jsonl of github.com/openai/grade-school-math; --quick does without. What is finished
stays in --work and is not done again. The teacher in --work/teacher is one that `hymba-tune distill --teacher` takes.
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

import distill_losses as signals
import distill_students as students
import distill_teachers as teachers
import distill_texts as texts
import harness
import torch
from distill_losses import Setting
from distill_students import Way

from hymba_tune.distill.projection import SparseTarget
from hymba_tune.distill.targets import Targets

SEEDS = 3
RATES = (1.5e-3, 3e-3, 6e-3)
PROJECTION = Setting()
WAYS = {
    "cross-entropy": Way("ce"),
    "sorted ULD": Way("uld", PROJECTION),
    "chunk likelihood": Way("alm", PROJECTION),
    "projection": Way("projection", PROJECTION),
    "projection, first pieces alone": Way("projection", Setting(in_context=False)),
    "projection, no second cover": Way("projection", Setting(second_cover=False)),
    "projection, no bucket": Way("projection", Setting(bucket=False)),
    "projection, none of the three": Way("projection", Setting(in_context=False, second_cover=False, bucket=False)),
    "projection + chunks": Way("projection+alm", PROJECTION),
    "sequence-level": Way("ce", written=True),
    "same tokenizer": Way("kl", Setting(twin=True)),
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
"""What is changed of the winner."""
LONGER = 8
"""How many times as many steps it takes until tasks with digits are answered."""
RIVAL = "chunk likelihood"
"""What is trained so long beside cross-entropy, the winner and the ceiling."""


@dataclass(frozen=True)
class Size:
    """How much is trained and measured.

    Attributes:
        body: Of the teachers, for a `LlamaConfig`.
        teacher_steps: In both stages.
        twin_steps: Likewise; its tokens are shorter, and it is to be as good.
        steps: Of a student.
        written: Tokens of an answer, at most.
        counts: Rows.
    """

    body: dict[str, int]
    teacher_steps: tuple[int, int]
    twin_steps: tuple[int, int]
    steps: int
    written: int
    counts: texts.Counts


FULL = Size(teachers.FULL, (1250, 550), (1700, 1400), 120, 160, texts.FULL)
QUICK = Size(teachers.QUICK, (1, 1), (1, 1), 2, 4, texts.QUICK)
LEARNING_RATES = (1.5e-3, 1e-3)
"""Of the teachers' two stages."""


@dataclass(frozen=True)
class Task:
    """One run; ``writes`` says whether the student also writes, which takes long; ``times`` as many steps."""

    name: str
    way: Way
    lr: float
    seed: int
    writes: bool
    times: int = 1

    @property
    def key(self) -> str:
        """Under which it is kept."""
        return f"{self.name}, {self.lr:g}, seed {self.seed}"


@dataclass(frozen=True)
class Bench:
    """Where a benchmark works, and on what."""

    work: Path
    texts: texts.Texts
    size: Size

    def teacher(self, *, twin: bool) -> Path:
        """The folder of a teacher, trained if need be."""
        folder = self.work / ("twin" if twin else "teacher")
        if not (folder / "config.json").is_file():
            general, subject = self.texts.teacher()
            if twin:
                tokenizer = teachers.twin_tokenizer()
            else:
                tokenizer = teachers.train_tokenizer(map(teachers.spelled, general), teachers.VOCABULARY)
            steps = self.size.twin_steps if twin else self.size.teacher_steps
            parts = zip((general, subject), steps, LEARNING_RATES, strict=True)
            teachers.train(tokenizer, [teachers.Stage(*part) for part in parts], self.size.body, folder)
        return folder

    def signals(self, way: Way) -> list[signals.Lesson]:
        """What a way teaches, made if need be."""
        with torch.serialization.safe_globals([signals.Lesson, Targets, SparseTarget]):
            taught: list[signals.Lesson] = torch.load(self.make_lessons(way), weights_only=True)
        return taught

    def make_lessons(self, way: Way) -> Path:
        """Their file."""
        name = "written" if way.written else "plain" if way.setting is None else _name(way.setting)
        path = self.work / "lessons" / f"{name}.pt"
        if path.is_file():
            return path
        teachers.console.print(f"lessons: {name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        examples = self.texts.student()
        if way.written:
            examples = signals.rewritten(examples, self.teacher(twin=False), self.size.written)
        if way.setting is None:
            made = signals.plain_lessons(examples)
        else:
            made = signals.taught_lessons(examples, self.teacher(twin=way.setting.twin), way.setting)
        torch.save(made, path)
        return path


def _name(setting: Setting) -> str:
    return "-".join(f"{name}={value}" for name, value in asdict(setting).items())


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, measure and report."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--gsm8k", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--teacher-only", action="store_true")
    parser.add_argument("--processes", type=int, default=1)
    own, rest = parser.parse_known_args(arguments)
    given = harness.options(__doc__, rest, repeats=SEEDS)
    if own.gsm8k is None and not given.quick:
        parser.error("--gsm8k FOLDER is needed, or --quick")
    with tempfile.TemporaryDirectory() as folder:
        size = QUICK if given.quick else FULL
        bench = Bench(own.work or Path(folder), texts.Texts(own.gsm8k, size.counts), size)
        if own.teacher_only:
            bench.teacher(twin=False)
            return
        ways = {name: WAYS[name] for name in (FLOOR, "projection", CEILING)} if given.quick else WAYS
        around = dict(list(AROUND.items())[: 1 if given.quick else None])
        rates = RATES[:1] if given.quick else RATES
        runs = Runs(bench, own.processes)
        seeds = range(given.repeats)
        runs.do([Task(name, way, lr, 0, len(seeds) == 1) for name, way in ways.items() for lr in rates])
        best = {name: min(rates, key=lambda lr: runs.of(name, lr)[0]["all"]) for name in ways}
        runs.do([Task(name, ways[name], best[name], seed, True) for seed in seeds for name in ways])
        report_ways(runs, best, given)
        others = [name for name in ways if name not in (FLOOR, CEILING)]
        winner = min(others, key=lambda name: mean(run["all"] for run in runs.of(name, best[name])))
        changed = {f"{winner}, {name}": change(ways[winner], facts) for name, facts in around.items()}
        rate = best[winner]
        runs.do([Task(name, way, rate, seed, False) for seed in seeds for name, way in changed.items()])
        report_around(runs, [winner, *changed], rate, given)
        longer = {f"{name}, longer": name for name in (FLOOR, RIVAL, winner, CEILING) if name in ways}
        times = 2 if given.quick else LONGER
        runs.do([Task(key, ways[n], best[n], seed, True, times) for seed in seeds for key, n in longer.items()])
        report_longer(runs, {key: best[name] for key, name in longer.items()}, given)
        report_teachers(bench, given)


def change(way: Way, facts: dict[str, Any]) -> Way:
    """A way with some of its facts, or its setting's, changed."""
    if "temperature" in facts:
        return replace(way, setting=replace(way.setting, **facts))
    return replace(way, **facts)


class Runs:
    """Finished runs, and how more of them are made."""

    def __init__(self, bench: Bench, processes: int) -> None:
        self.bench, self.processes = bench, processes
        self.path = bench.work / "runs.jsonl"
        self.finished: dict[str, dict[str, Any]] = {}
        if self.path.is_file():
            rows = map(json.loads, self.path.read_text(encoding="utf-8").splitlines())
            self.finished = {row["key"]: row for row in rows}

    def of(self, name: str, lr: float) -> list[dict[str, float]]:
        """What was measured, seed by seed."""
        rows = [row for row in self.finished.values() if (row["name"], row["lr"]) == (name, lr)]
        return [row["measured"] for row in sorted(rows, key=lambda row: int(row["seed"]))]

    def do(self, tasks: Sequence[Task]) -> None:
        """Run what has not been run."""
        left = [task for task in tasks if task.key not in self.finished]
        if self.processes == 1:
            for task in left:
                self._keep(run(self.bench, task))
            return
        with ProcessPoolExecutor(self.processes, get_context("spawn")) as pool:
            started = []
            for task in left:
                self.bench.make_lessons(task.way)  # here, or several processes would make the same ones
                started.append(pool.submit(run, self.bench, task))
                started[-1].add_done_callback(lambda done: self._keep(done.result()))
            for future in started:
                future.result()

    def _keep(self, row: dict[str, Any]) -> None:
        self.finished[row["key"]] = row
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        bits, seconds = row["measured"]["all"], row["seconds"]
        teachers.console.print(f"{row['key']}: {bits:.4f} bits a byte, {seconds:.0f} s")


def run(bench: Bench, task: Task) -> dict[str, Any]:
    """Train and measure one student."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    taught, head = bench.signals(task.way), None
    if task.way.loss in ("uld", "kl"):
        head = signals.load(bench.teacher(twin=task.way.setting.twin))[0].get_output_embeddings().weight.detach()
    student = students.train(taught, task.way, task.lr, task.seed, bench.size.steps * task.times, head)
    trained = time.perf_counter() - began
    held_out = bench.texts.held_out()
    measured = students.bits_per_byte(student, held_out, students.nano()[1])
    if task.writes:
        measured |= students.writing(student, held_out, bench.teacher(twin=False), bench.size.written)
    seconds = time.perf_counter() - began
    facts = {"name": task.name, "lr": task.lr, "seed": task.seed, "seconds": seconds, "trained": trained}
    return {"key": task.key, **facts, "measured": measured}


def report_ways(runs: Runs, best: dict[str, float], given: harness.Options) -> None:
    """Every way at its best learning rate."""
    base = runs.of(FLOOR, best[FLOOR])
    rows = [cells(name, runs.of(name, lr), lr, base) for name, lr in best.items()]
    by_name = {row["loss"]: row[BITS] for row in rows}
    for row in rows:
        row["way %"] = 100 * (by_name[FLOOR] - row[BITS]) / (by_name[FLOOR] - by_name[CEILING])
    size = runs.bench.size
    notes = [
        f"{size.steps} steps of {students.STEP_TOKENS} tokens, all weights, AdamW, {len(RATES)} learning rates "
        f"({', '.join(f'{rate:g}' for rate in RATES)}); the best on the first seed.",
        "Thousandths of a bit that a byte of held-out answers costs, all and by kind. change: from the first row on "
        "the same seeds, each of which gives every loss the same rows in the same order; +- is its standard deviation.",
        "chunks: the likelihood of the smallest spans that both tokenizers bound, where the projection has no target.",
        "way: from cross-entropy (0 %) to the same tokenizer's teacher (100 %). exact: digit tasks answered exactly. "
        "teacher's: of GSM8K answers that the student samples, in the teacher's eyes; both without the first seed.",
    ]
    columns = ["loss", "lr", BITS, "change", "+-", "way %", *runs.bench.texts.held_out(), "exact %", "teacher's"]
    harness.report("distill", columns, rows, notes, given)


def report_around(runs: Runs, names: Sequence[str], lr: float, given: harness.Options) -> None:
    """The winner with one thing changed."""
    base = runs.of(names[0], lr)
    rows = [cells(name, runs.of(name, lr), lr, base) for name in names]
    notes = [f"The first row has k {Way.k}, alpha {Way.alpha}, temperature 1; all at its learning rate."]
    harness.report("distill_around", list(rows[-1]), rows, notes, given)


def report_longer(runs: Runs, rates: dict[str, float], given: harness.Options) -> None:
    """The chief ways with more steps."""
    base = runs.of(f"{FLOOR}, longer", rates[f"{FLOOR}, longer"])
    rows = [cells(name, runs.of(name, lr), lr, base) for name, lr in rates.items()]
    notes = [f"{LONGER * runs.bench.size.steps} steps, at the learning rate that was best for {runs.bench.size.steps}."]
    harness.report("distill_longer", list(rows[0]), rows, notes, given)


def cells(
    name: str, measured: Sequence[dict[str, float]], lr: float, base: Sequence[dict[str, float]]
) -> dict[str, Any]:
    """A row of the table: means over the seeds, bits in thousandths; ``base`` is the first row's."""
    means = {key: mean(run[key] for run in measured if key in run) for key in measured[-1]}
    apart = [1000 * (run["all"] - other["all"]) for run, other in zip(measured, base, strict=False)]
    kinds = {kind: 1000 * means[kind] for kind in means if kind not in ("all", "exact", "teacher")}
    return {
        "loss": name,
        "lr": f"{lr:g}",
        "seeds": len(measured),
        BITS: 1000 * means["all"],
        "change": mean(apart),
        "+-": stdev(apart) if len(apart) > 1 else 0.0,
        **kinds,
        **({"exact %": 100 * means["exact"], "teacher's": 1000 * means["teacher"]} if "exact" in means else {}),
    }


def report_teachers(bench: Bench, given: harness.Options) -> None:
    """How good the teachers are, beside hymba-nano as it is packaged."""
    held_out = bench.texts.held_out()
    models = {
        "teacher": signals.load(bench.teacher(twin=False)),
        "same tokenizer": signals.load(bench.teacher(twin=True)),
        "student": students.nano(),
    }
    rows = []
    for name, (model, tokenizer) in models.items():
        found = students.bits_per_byte(model, held_out, tokenizer)
        bits = {BITS: 1000 * found.pop("all")} | {kind: 1000 * value for kind, value in found.items()}
        rows.append({"model": name, "parameters": model.num_parameters(), "vocabulary": len(tokenizer), **bits})
    notes = ["Thousandths of a bit that a byte of held-out answers costs; the student as it is packaged."]
    harness.report("distill_teachers", list(rows[0]), rows, notes, given)


if __name__ == "__main__":
    main()

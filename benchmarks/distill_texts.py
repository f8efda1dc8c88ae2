"""The distillation benchmark's data: Python's library, GSM8K's solutions, and small tasks with digits."""

from __future__ import annotations

import json
import random
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hymba_tune.data.formats import Example, parse

Rows = list[dict[str, Any]]

PART = 600
"""Minimum length of a part of a long text, in characters."""
EXCLUDED = {"site-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data", "ensurepip"}


@dataclass(frozen=True)
class Counts:
    """Numbers of rows for the student and held out, by kind, and of all digit tasks; characters of Python's library."""

    student: dict[str, int]
    held_out: dict[str, int]
    digits: int
    library: int


FULL = Counts({"gsm8k": 600, "digits": 1350}, {"gsm8k": 120, "digits": 300}, 3000, 2_200_000)
QUICK = Counts({"gsm8k": 2, "digits": 8}, {"gsm8k": 2, "digits": 4}, 40, 50_000)
REPEATED = 6
"""How often the data of the teachers' second stage repeats the digit tasks, which are few and short."""


@dataclass(frozen=True)
class Texts:
    """The training data of the teachers, that of the student, and the held-out data; the same at every call.

    The teachers are not trained on the student's GSM8K questions, so that their predictions there are like those for
    any user's data. The digit tasks are too few for this.

    Attributes:
        gsm8k: Folder with ``train.jsonl`` and ``test.jsonl`` of github.com/openai/grade-school-math.
        counts: Numbers of rows.
    """

    gsm8k: Path | None
    counts: Counts

    def teacher(self) -> tuple[list[Example], list[Example]]:
        """The training data of the teachers' first and second stages."""
        tasks = digits()[self.counts.held_out["digits"] : self.counts.digits]
        solutions = self._solutions("train")[self.counts.student["gsm8k"] :]
        return _parsed(library(self.counts.library) + solutions + tasks), _parsed(solutions + REPEATED * tasks)

    def student(self) -> list[Example]:
        """The student's training data."""
        held_out = self.counts.held_out["digits"]
        count = self.counts.student["digits"]
        solutions = self._solutions("train")[: self.counts.student["gsm8k"]]
        return _parsed(solutions + digits()[held_out : held_out + count])

    def held_out(self) -> dict[str, list[Example]]:
        """The held-out data, by kind."""
        result = {"digits": _parsed(digits()[: self.counts.held_out["digits"]])}
        if self.gsm8k is not None:
            result["gsm8k"] = _parsed(self._solutions("test")[: self.counts.held_out["gsm8k"]])
        return result

    def _solutions(self, name: str) -> Rows:
        if self.gsm8k is None:
            return []
        with (self.gsm8k / f"{name}.jsonl").open(encoding="utf-8") as file:
            rows = [{"prompt": row["question"], "completion": row["answer"]} for row in map(json.loads, file)]
        return random.Random("gsm8k").sample(rows, len(rows))


def _parsed(rows: Rows) -> list[Example]:
    return [parse(row) for row in rows]


def library(size: int) -> Rows:
    """Parts of Python's library, together about ``size`` characters."""
    folder = Path(sysconfig.get_path("stdlib"))
    paths = sorted(path for path in folder.rglob("*.py") if not EXCLUDED & set(path.relative_to(folder).parts))
    rows: Rows = []
    for path in random.Random("library").sample(paths, len(paths)):
        text = path.read_text(encoding="utf-8", errors="ignore")
        size -= len(text)
        rows.extend({"text": part} for part in split_lines(text))
        if size < 0:
            break
    return rows


def split_lines(text: str) -> Iterator[str]:
    """A text in parts of whole lines; an incomplete last part is dropped."""
    part = ""
    for line in text.splitlines(keepends=True):
        part += line
        if len(part) >= PART:
            yield part
            part = ""


def digits() -> Rows:
    """Unique tasks with exact answers, with numbers that the two tokenizers split differently."""
    rng = random.Random("digits")
    sums = [(f"What is {a} + {b}?", f"{a} + {b} = {a + b}") for a in range(100) for b in range(10)]
    counts = [(f"Count on from {a}.", f"{a}, {a + 1}, {a + 2}") for a in range(1000)]
    pairs = rng.sample([(a, b) for a in range(100) for b in range(100) if a != b], 1000)
    larger = [(f"Which is larger, {a} or {b}?", f"{max(a, b)} is larger than {min(a, b)}.") for a, b in pairs]
    tasks = [*sums, *counts, *larger]
    return [{"prompt": prompt, "completion": answer} for prompt, answer in rng.sample(tasks, len(tasks))]

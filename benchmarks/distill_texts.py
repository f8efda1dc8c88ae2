"""What the distillation benchmark reads: Python's library, GSM8K's solutions, and little tasks with digits."""

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

PIECE = 600
"""Characters of a piece of a long text, at least."""
UNLIKE_LIBRARY = {"site-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data", "ensurepip"}


@dataclass(frozen=True)
class Counts:
    """Rows for the student, and held out, by kind; those of tasks with digits in all; bytes of Python's library."""

    student: dict[str, int]
    held_out: dict[str, int]
    digits: int
    library: int


FULL = Counts({"gsm8k": 600, "digits": 1350}, {"gsm8k": 120, "digits": 300}, 3000, 2_200_000)
QUICK = Counts({"gsm8k": 2, "digits": 8}, {"gsm8k": 2, "digits": 4}, 40, 50_000)
REPEATED = 6
"""How often the teachers' second texts hold the tasks with digits, which are few and short."""


@dataclass(frozen=True)
class Texts:
    """What the teachers learn, what they teach the student with, and what neither sees; the same at every call.

    The teachers do not learn the student's questions of GSM8K: what they say of them is what they would say of any
    user's. Tasks with digits are too few for that.

    Attributes:
        gsm8k: Folder with ``train.jsonl`` and ``test.jsonl`` of github.com/openai/grade-school-math.
        counts: How many.
    """

    gsm8k: Path | None
    counts: Counts

    def teacher(self) -> tuple[list[Example], list[Example]]:
        """What the teachers learn first, and what then."""
        tasks = digits()[self.counts.held_out["digits"] : self.counts.digits]
        solved = self._solutions("train")[self.counts.student["gsm8k"] :]
        return _parsed(library(self.counts.library) + solved + tasks), _parsed(solved + REPEATED * tasks)

    def student(self) -> list[Example]:
        """What the student learns."""
        held_out, count = self.counts.held_out["digits"], self.counts.student["digits"]
        solved = self._solutions("train")[: self.counts.student["gsm8k"]]
        return _parsed(solved + digits()[held_out : held_out + count])

    def held_out(self) -> dict[str, list[Example]]:
        """What is held out, by kind."""
        found = {"digits": _parsed(digits()[: self.counts.held_out["digits"]])}
        if self.gsm8k is not None:
            found["gsm8k"] = _parsed(self._solutions("test")[: self.counts.held_out["gsm8k"]])
        return found

    def _solutions(self, name: str) -> Rows:
        if self.gsm8k is None:
            return []
        with (self.gsm8k / f"{name}.jsonl").open(encoding="utf-8") as file:
            rows = [{"prompt": row["question"], "completion": row["answer"]} for row in map(json.loads, file)]
        return random.Random("gsm8k").sample(rows, len(rows))


def _parsed(rows: Rows) -> list[Example]:
    return [parse(row) for row in rows]


def library(size: int) -> Rows:
    """Pieces of Python's library, about so many bytes."""
    folder = Path(sysconfig.get_path("stdlib"))
    paths = sorted(path for path in folder.rglob("*.py") if not UNLIKE_LIBRARY & set(path.relative_to(folder).parts))
    rows: Rows = []
    for path in random.Random("library").sample(paths, len(paths)):
        text = path.read_text(encoding="utf-8", errors="ignore")
        size -= len(text)
        rows.extend({"text": piece} for piece in pieces(text))
        if size < 0:
            break
    return rows


def pieces(text: str) -> Iterator[str]:
    """A text in pieces of whole lines."""
    piece = ""
    for line in text.splitlines(keepends=True):
        piece += line
        if len(piece) >= PIECE:
            yield piece
            piece = ""


def digits() -> Rows:
    """Tasks with exact answers, none twice: numbers that the two tokenizers cut up in different ways."""
    drawn = random.Random("digits")
    sums = [(f"What is {a} + {b}?", f"{a} + {b} = {a + b}") for a in range(100) for b in range(10)]
    counts = [(f"Count on from {a}.", f"{a}, {a + 1}, {a + 2}") for a in range(1000)]
    pairs = drawn.sample([(a, b) for a in range(100) for b in range(100) if a != b], 1000)
    larger = [(f"Which is larger, {a} or {b}?", f"{max(a, b)} is larger than {min(a, b)}.") for a, b in pairs]
    tasks = [*sums, *counts, *larger]
    return [{"prompt": prompt, "completion": answer} for prompt, answer in drawn.sample(tasks, len(tasks))]

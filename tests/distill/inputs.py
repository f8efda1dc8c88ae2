"""Data that several tests of distillation read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

QUESTION = "What is the answer to the question?"
ANSWERS = ["The answer is 42.", "  indented,\n\n and  so on: 1,234", "naïve 🙂 中文", "It is half of 48, which is 24."]


@contextmanager
def quiet(label: str) -> Iterator[Callable[[int], None]]:
    del label
    yield lambda _: None


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def talks(path: Path) -> str:
    return write(path, [{"prompt": QUESTION, "completion": answer} for answer in ANSWERS])

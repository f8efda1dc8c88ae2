"""Runs of distillation that take a second or two."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

from hymba_tune.config import DistillConfig
from hymba_tune.distill.run import run_distill
from hymba_tune.train.run import Run
from hymba_tune.train.screen import Screen
from tests.runs import ANSWER_TOKENS


def random_teacher(teacher: Path, folder: Path) -> dict[str, Any]:
    """Settings for a teacher that knows nothing of the data; its targets are kept in the folder."""
    return {
        "teacher": str(teacher),
        "teacher_dtype": "float32",
        "teacher_cache": folder / "targets",
        "min_teacher_probability": 0.0,
        "min_end_probability": 0.0,
    }


def settings(model: Path, teacher: Path, data: Path, out: Path, **changes: Any) -> DistillConfig:
    """Two steps of LoRA, unless changed."""
    usual: dict[str, Any] = {"dtype": "float32", "rank": 4, "lr": 1e-2, "batch_size": 4}
    usual |= {"steps": 2, "log_every": 1, "max_length": 64, "eval_max_rows": 4, "eval_split": 0.2}
    usual |= random_teacher(teacher, out.parent)
    given = {"model": str(model), "data": [str(data)], "out": out}
    return DistillConfig(**given | usual | changes)


def run(config: DistillConfig, screen: Screen | None = None, *, report: bool = False) -> Run:
    """`run_distill` with short sample answers, and without drawing its report."""
    drawn = nullcontext() if report else patch("hymba_tune.report.write_report")
    with patch("hymba_tune.train.samples.SAMPLE_TOKENS", ANSWER_TOKENS), drawn:
        finished = run_distill(config, screen or Screen())
    assert finished is not None or config.dry_run
    return finished  # type: ignore[return-value]


class RecordingScreen(Screen):
    """A screen that records what is shown."""

    def __init__(self) -> None:
        self.lines: dict[str, str] = {}
        self.notes: list[str] = []
        self.progress: list[tuple[str, int, int | None]] = []

    @contextmanager
    def working(self, label: str, total: int | None = None) -> Any:
        yield lambda done: self.progress.append((label, done, total))

    def banner(self, lines: dict[str, str]) -> None:
        self.lines |= lines

    def note(self, text: str) -> None:
        self.notes.append(text)

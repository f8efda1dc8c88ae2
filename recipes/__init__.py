"""Recipes: settings of whole runs, as YAML under a header that says what they are for and what they take."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

LABELS = ("hardware", "memory", "time")


@dataclass(frozen=True)
class Recipe:
    """What a recipe's header says.

    Attributes:
        name: To be used with ``--config``.
        path: Its file.
        what: What it does, in a sentence.
        command: A command that uses it.
        hardware: What it is meant for.
        memory: Measured, or "not measured".
        time: Likewise.
    """

    name: str
    path: Path
    what: str
    command: str
    hardware: str
    memory: str
    time: str


def packaged() -> list[Recipe]:
    """The recipes that come with the package, by name."""
    folder = Path(str(resources.files("hymba_tune.recipes")))
    return [read_header(path) for path in sorted(folder.glob("*.yaml"))]


def read_header(path: Path) -> Recipe:
    """What the comment at the head of a recipe says; empty where it says nothing."""
    lines = path.read_text(encoding="utf-8").splitlines()
    header = [line.removeprefix("#").strip() for line in lines if line.startswith("#")]
    labels = {label: text.strip() for label, _, text in (line.partition(":") for line in header) if label in LABELS}
    commands = [line for line in header if line.startswith("hymba-tune ")]
    what = re.split(r"(?<=[.:])\s", header[0])[0].rstrip(".:") if header else ""
    return Recipe(
        path.stem,
        path,
        what,
        commands[0] if commands else "",
        *(labels.get(label, "") for label in LABELS),
    )

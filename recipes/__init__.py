"""Recipes: settings of whole runs, as YAML under a header that says what they are for and what they take."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from itertools import takewhile
from pathlib import Path

LABELS = ("data", "hardware", "memory", "time")


@dataclass(frozen=True)
class Recipe:
    """What a recipe's header says.

    Attributes:
        name: To be used with ``--config``.
        path: Its file.
        what: What it is for, in a sentence.
        command: A command that uses it.
        data: The data that it takes.
        hardware: What it is meant for.
        memory: Measured or estimated.
        time: Likewise.
    """

    name: str
    path: Path
    what: str
    command: str
    data: str
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
    comment = [line.removeprefix("#") for line in lines if line.startswith("#")]
    sentences = takewhile(lambda line: not line.startswith("  "), comment)  # until the commands
    header = [line.strip() for line in comment]
    labels = {label: text.strip() for label, _, text in (line.partition(":") for line in header) if label in LABELS}
    commands = [line for line in header if line.startswith("hymba-tune ")]
    what = " ".join(line.strip() for line in sentences).rstrip(".:")
    return Recipe(
        path.stem,
        path,
        what,
        commands[0] if commands else "",
        *(labels.get(label, "") for label in LABELS),
    )

"""Writes recipes as YAML, with a comment for each setting."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from pydantic_core import to_jsonable_python

from hymba_tune.config import TrainingConfig

FIRST_SENTENCE = re.compile(r"(?<=\.)\s")


def recipe_text(verb: str, settings: Mapping[str, Any], heading: Sequence[str]) -> str:
    """Return a recipe as the text of a file.

    Args:
        verb: The verb that it is for.
        settings: Its settings by name.
        heading: Lines for its first comment.
    """
    fields = TrainingConfig.of(verb).model_fields
    lines = [f"# {_printable(line)}".rstrip() for line in heading]
    lines.append(f"verb: {verb}")
    for name, value in settings.items():
        description = " ".join((fields[name].description or "").split())
        lines += [
            "",
            *textwrap.wrap(FIRST_SENTENCE.split(description)[0], 118, initial_indent="# ", subsequent_indent="# "),
        ]
        written = yaml.safe_dump([to_jsonable_python(value)], default_flow_style=True, allow_unicode=True, width=10_000)
        lines.append(f"{name}: {written.strip()[1:-1]}")
    return "\n".join(lines) + "\n"


def _printable(text: str) -> str:
    """Return a text that ends no comment and that YAML can hold, whatever names of files it contains."""
    return "".join(character if character.isprintable() else "?" for character in text)

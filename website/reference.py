"""Generates the reference: commands and settings, recipes, data formats, errors, environment variables, Python API."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hymba_tune import errors
from hymba_tune.cli.main import INTERNAL_ERROR, INTERRUPTED, USER_ERROR
from hymba_tune.data.converting import TARGETS
from hymba_tune.data.formats import EXTRAS, FORMATS, PAIR
from hymba_tune.data.writers import KINDS
from hymba_tune.recipes import packaged
from website.environment import described
from website.settings import Command, commands, describe, prose, tables

API = {
    "hymba_tune": "Importing the package registers Hymba with the Auto classes of transformers",
    "hymba_tune.model": "The model: configuration, Auto classes, cache, kernels",
    "hymba_tune.generate": "Opening a model, and generating texts with it",
    "hymba_tune.data": "Reading data, and encoding it with a chat template and a loss mask",
    "hymba_tune.config": "The settings: a class for each command, with the attributes that [its page](index.md) lists",
    "hymba_tune.errors": "The errors",
}
"""The public modules. Others may change in any version."""
FOLDER = "reference"


@cache
def pages() -> dict[str, str]:
    """Write every page of the reference.

    Returns:
        Their Markdown, by the name of the file in `docs/`, in the order in which they are listed.
    """
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.HymbaTuneError)]
    kinds.sort(key=lambda kind: (len(kind.__mro__), kind.__name__))
    codes = {"user_error": USER_ERROR, "internal_error": INTERNAL_ERROR, "interrupted": INTERRUPTED}
    rows = {"formats": FORMATS, "pair": PAIR, "extras": EXTRAS, "targets": TARGETS, "kinds": KINDS}
    summaries = [(command.words, _summary(command)) for command in commands()]

    written = {"index": _filled("overview", commands=summaries)}
    written |= {verb: command_page(verb) for verb in verbs()}
    written["packaged-recipes"] = _filled("recipes", recipes=packaged())
    written["data-formats"] = _filled("formats", **rows)
    written["exit-codes"] = _filled("exit_codes", errors=kinds, **codes)
    written["environment"] = _filled("environment", groups=described())
    written |= {module: _api(module, what) for module, what in API.items()}
    return {f"{FOLDER}/{name}.md": text for name, text in written.items()}


def navigation() -> list[Any]:
    """Order the pages as MkDocs' ``nav`` does."""
    index, *others = pages()
    last, first = len(others) - len(API), len(verbs())
    return [index, {"Commands": others[:first]}, *others[first:last], {"Python": others[last:]}]


def verbs() -> list[str]:
    """The commands without their subcommands, in the order of `--help`."""
    return [command.words[0] for command in commands() if len(command.words) == 1]


def command_page(verb: str) -> str:
    """Describe a command and its subcommands."""
    parts = []
    for command in commands():
        words = command.words
        if words[0] != verb:
            continue
        level = 1 if len(words) == 1 else 2
        parts += [f"{'#' * level} hymba-tune {' '.join(words)}\n", describe(command), ""]
        if command.settings:
            variable = "_".join(["HYMBA_TUNE", *words, ""]).upper().replace("-", "_")
            parts += [f"Environment variables: `{variable}` and the name of a flag in capitals.\n"]
        parts += [tables(command, level=level + 1)]
    return "\n".join(parts)


def _summary(command: Command) -> str:
    return describe(command).split("```")[0].splitlines()[0]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _filled(template: str, **facts: Any) -> str:
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, undefined=StrictUndefined, autoescape=False)
    environment.filters |= {"listed": _listed, "prose": prose}
    return environment.get_template(f"{template}.md.j2").render(facts)


def _api(module: str, what: str) -> str:
    """Write a page for mkdocstrings, which reads the docstrings of a module."""
    limits = {"hymba_tune": "members: [__version__]", "hymba_tune.config": "filters: ['!^[a-z_]']"}
    options = f"    options:\n      {limits[module]}\n" if module in limits else ""
    return f"# {module}\n\n{what}.\n\n::: {module}\n{options}"

"""Tables of the commands' arguments and settings, from the classes that also give `--help`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, get_args

from cyclopts import App
from cyclopts.argument import Argument

from hymba_tune.cli.main import app
from hymba_tune.config import Config

TYPES = {
    "integer": "whole number",
    "number": "number",
    "string": "text",
    "boolean": "switch",
    "array": "list",
    "object": "mapping",
}
"""Words for the types of a JSON schema."""
BOUNDS = {"minimum": "≥ {}", "exclusiveMinimum": "> {}", "maximum": "≤ {}", "exclusiveMaximum": "< {}"}
Schema = Mapping[str, Any]


@dataclass(frozen=True)
class Command:
    """A command, or a subcommand.

    Attributes:
        words: The words that call it.
        app: What cyclopts knows of it.
        arguments: Its arguments; none for a command that only has subcommands.
    """

    words: tuple[str, ...]
    app: App
    arguments: Sequence[Argument]

    @property
    def settings(self) -> type[Config] | None:
        """The settings class that it takes; `None` if it has none."""
        hints = (argument.hint for argument in self.arguments)
        return next((hint for hint in hints if inspect.isclass(hint) and issubclass(hint, Config)), None)


@cache
def commands() -> list[Command]:
    """Return every command, followed by its subcommands."""
    return [*_below(app, ())]


def _below(parent: App, words: tuple[str, ...]) -> Iterator[Command]:
    for name in (name for name in parent if not name.startswith("-")):
        child, own = parent[name], (*words, name)
        arguments = child.assemble_argument_collection(parse_docstring=True) if child.default_command else ()
        yield Command(own, child, arguments)
        yield from _below(child, own)


def describe(command: Command) -> str:
    """Write the help text of a command; its examples become blocks that can be copied."""
    function = command.app.default_command
    text = inspect.getdoc(function) if function else command.app.help
    paragraphs = (text or "").split("\nParameters\n")[0].strip().split("\n\n")
    return "\n\n".join(_paragraph(" ".join(paragraph.split())) for paragraph in paragraphs)


def _paragraph(text: str) -> str:
    label, found, example = text.partition(": hymba-tune ")
    return f"{prose(label)}:\n```\nhymba-tune {example}\n```" if found else prose(text)


def tables(command: Command, *, level: int) -> str:
    """Write a table of arguments for each group of `--help`.

    Args:
        command: The command. Its words after the first are in the anchors of its flags: ``#check--map``.
        level: The level of the headings.
    """
    schema = command.settings.model_json_schema() if command.settings else {}
    groups: dict[str, list[Argument]] = {}
    shown = [argument for argument in command.arguments if argument.parse and "*" not in argument.names]
    for argument in sorted(shown, key=_place):
        groups.setdefault(argument.parameter.group[0].name, []).append(argument)
    has_recipe = any("--config" in argument.names or "--recipe" in argument.names for argument in shown)

    parts = []
    for name, arguments in groups.items():
        parts += [f"{'#' * level} {name}\n"]
        titles = ["flag", "description", "type", "default", *(["recipe key"] if has_recipe else [])]
        parts += [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
        parts += [_line(argument, schema, "-".join(command.words[1:]), has_recipe=has_recipe) for argument in arguments]
        parts += [""]
    return "\n".join(parts)


def _place(argument: Argument) -> tuple[int, int]:
    key = argument.parameter.group[0].sort_key
    return (0, key) if isinstance(key, int) else (-1, 0)


def _line(argument: Argument, schema: Schema, prefix: str, *, has_recipe: bool) -> str:
    key = argument.keys[0] if argument.keys else ""
    own = schema.get("properties", {}).get(key, {}) if key else {}
    names = [name for name in argument.names if not name.startswith("--no-")]
    flags = ", ".join(f"`{name}`" for name in names)
    anchor = f"{{ #{prefix}{names[0]} }}" if names[0].startswith("--") else ""
    kind = _kind(own, schema) if own else _plain_kind(argument.hint)
    cells = [f"{flags}{anchor}", prose(argument.parameter.help or ""), kind, _default(argument)]
    return f"| {' | '.join([*cells, *([f'`{key}`' if key else ''] if has_recipe else [])])} |"


def _kind(schema: Schema, root: Schema) -> str:
    """Describe a type and its bounds: ``whole number ≥ 1``."""
    if "$ref" in schema:
        return _kind(root["$defs"][schema["$ref"].rsplit("/", 1)[1]], root)
    if options := [option for option in schema.get("anyOf", ()) if option.get("type") != "null"]:
        return " or ".join(_kind(option, root) for option in options)
    if choices := schema.get("enum", [schema["const"]] if "const" in schema else []):
        return ", ".join(f"`{choice}`" for choice in choices)
    if schema.get("format") == "path":
        return "path"
    kind = TYPES[schema["type"]]
    if schema["type"] == "array":
        inner = _kind(schema.get("items", {"type": "string"}), root)
        return "list" if inner == "text" else f"list of {inner}"
    bounds = [text.format(f"{schema[name]:g}") for name, text in BOUNDS.items() if name in schema]
    return f"{kind} {', '.join(bounds)}".strip()


def _plain_kind(hint: Any) -> str:
    """Describe the type of an argument that is no setting."""
    kinds = [kind for kind in get_args(hint) or (hint,) if kind not in (type(None), ...)]
    words = {bool: "switch", Path: "path", int: "whole number", float: "number", str: "text"}
    return ", ".join(words.get(kind, f"`{kind}`") for kind in kinds)


def _default(argument: Argument) -> str:
    if argument.required:
        return "required"
    value = argument.field_info.default
    if value is inspect.Parameter.empty or value is None or value == [] or isinstance(value, bool):
        return "on" if value is True else ""
    values = value if isinstance(value, list) else [value]
    return " ".join(f"`{one.value if isinstance(one, Enum) else one}`" for one in values)


def prose(text: str) -> str:
    """Return a text for a table or a paragraph of Markdown: flags as code, and no character with a meaning."""
    text = " ".join(text.split())
    text = re.sub(r"([|<>*\[\]])", r"\\\1", text)
    return re.sub(r"(?<![\w`-])--[a-z][\w-]*", r"`\g<0>`", text)

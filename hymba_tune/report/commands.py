"""Commands that repeat a run, or continue from it."""

from __future__ import annotations

from typing import Any

from hymba_tune.config import TrainingConfig, Verb
from hymba_tune.errors import command
from hymba_tune.report.record import RunRecord


def defaults(verb: Verb) -> dict[str, Any]:
    """Return the default settings of a verb; none for a verb that this version does not have."""
    kind = TrainingConfig.by_verb().get(verb.name)
    fields = kind.model_fields if kind else {}
    return {name: field.get_default(call_default_factory=True) for name, field in fields.items()}


def chosen(record: RunRecord) -> dict[str, Any]:
    """Return the settings of a run that differ from the defaults, those by model size included."""
    default = defaults(record.verb)
    by_size = record.facts.get("by_size", [])
    return {
        name: value
        for name, value in record.settings.items()
        if name not in by_size and (name not in default or default[name] != value)
    }


def repeat(record: RunRecord) -> str:
    """Return the command that repeats a run in another directory."""
    words = [record.verb.name]
    for name, value in chosen(record).items():
        words += _flag(name, value)
    return command(*words)


def next_commands(record: RunRecord) -> dict[str, str]:
    """Return the commands that may follow a run, by their labels."""
    commands = {}
    if any(record.path.glob("checkpoints/checkpoint-*")):
        commands["resume it"] = command(record.verb, "--resume", record.path)
    if record.verb.scores:
        return commands
    if any((record.path / folder).is_dir() for folder in ("adapter", "model")):
        commands["chat with it"] = command("chat", record.path)
    if (record.path / "adapter").is_dir():
        commands["merge it into one model"] = command("merge", record.path, "--out", f"{record.name}-merged")
    return commands


def _flag(name: str, value: Any) -> list[str]:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}", *map(written, value if isinstance(value, list) else [value])]


def written(value: Any) -> str:
    """Write the value of a setting as people do: ``8`` for 8.0."""
    if isinstance(value, list):
        return ", ".join(map(written, value))
    return f"{value:g}" if isinstance(value, float) and value.is_integer() else str(value)

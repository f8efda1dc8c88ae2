"""Traces the lineage of a model: its original base model, the license of that model, and the runs in between."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load

from hymba_tune.errors import CheckpointError
from hymba_tune.registry import ModelSource, hub_name, resolve_model, run_directory
from hymba_tune.report import RunRecord

LICENSE_KEYS = ("license", "license_name", "license_link")
CARD = "README.md"


@dataclass(frozen=True)
class Lineage:
    """The lineage of a model.

    Attributes:
        base: The original base model, on the Hub or hymba-nano, without a revision; None if it is not known.
        license: The license of that model in the keys of Hub cards: `license` and, without an id, its name and link.
        runs: The runs that trained the model, the last one first.
        adapter_base: The base model of the last run's adapter, if it is on the Hub or hymba-nano, with its revision, if
            the adapter names one.
        steps: The number of steps from the model through its base models to the original one.
    """

    base: str | None = None
    license: dict[str, str] = field(default_factory=dict)
    runs: tuple[RunRecord, ...] = ()
    adapter_base: str | None = None
    steps: int = 0


def trace(source: ModelSource) -> Lineage:
    """Trace a model back to its original base model through run directories, adapters and cards.

    Raises:
        HymbaTuneError: If one of the base models cannot be found.
    """
    runs = []
    steps = 0
    seen: set[Path] = set()
    while True:
        seen.add(source.folder.resolve())
        if (run := _run_of(source)) is not None:
            runs.append(run)
        base_name = source.base or (str(run.facts.get("model") or "") if run else "")
        if not base_name:
            break
        source = resolve_model(base_name)
        steps += 1
        if source.folder.resolve() in seen:
            raise CheckpointError(
                f"{source.folder} is its own base model.",
                expected="models that were trained from each other, down to a first one",
                fix="correct model in run.json, or base_model_name_or_path in adapter_config.json",
            )
    card = card_data(source.folder)
    base = source.published or _first(card.get("base_model"))
    return Lineage(base and hub_name(base)[0], license_of(card), tuple(runs), source.published, steps)


def license_of(card: dict[str, Any]) -> dict[str, str]:
    """Return the keys of a card's metadata that state the license."""
    return {name: str(card[name]) for name in LICENSE_KEYS if card.get(name)}


def card_data(folder: Path) -> dict[str, Any]:
    """Read the metadata of the model card in a folder; empty if there is no card.

    Raises:
        CheckpointError: If the metadata cannot be read.
    """
    path = folder / CARD
    if not path.is_file():
        return {}
    try:
        return dict(metadata_load(path) or {})
    except (yaml.YAMLError, ValueError, TypeError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"The metadata of {path} cannot be read: {error}", expected="YAML between two ---"
        ) from error


def _run_of(source: ModelSource) -> RunRecord | None:
    """Return the run whose directory contains the model, if there is one."""
    folder = run_directory(source.folder)
    return RunRecord.read(folder) if folder is not None and (folder / "config.yaml").is_file() else None


def _first(value: Any) -> str | None:
    """Return the first base model of a card, which names one or a list."""
    if isinstance(value, list):
        value = value[0] if value else None
    return str(value) if value else None

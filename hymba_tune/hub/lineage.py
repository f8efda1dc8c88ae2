"""Where a model comes from: the base it goes back to, that one's license, and the runs in between."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load

from hymba_tune.errors import CheckpointError
from hymba_tune.registry import ModelSource, resolve_model
from hymba_tune.report import RunRecord

LICENCE_KEYS = ("license", "license_name", "license_link")
CARD = "README.md"


@dataclass(frozen=True)
class Lineage:
    """Where a model comes from.

    Attributes:
        base: The model of the Hub, or hymba-nano, that it goes back to; None where nothing says.
        license: Of that model, as the Hub's cards say it: `license` and, of one without an id, its name and link.
        runs: That trained it, the last one first.
        below: What an adapter of the last run lies on, if that is a model of the Hub, or hymba-nano.
        steps: How many models the way back leads over.
    """

    base: str | None = None
    license: dict[str, str] = field(default_factory=dict)
    runs: tuple[RunRecord, ...] = ()
    below: str | None = None
    steps: int = 0


def trace(source: ModelSource) -> Lineage:
    """Follow a model back to its base, by what run directories, adapters and cards say.

    Raises:
        HymbaTuneError: If a model on the way cannot be found.
    """
    runs, steps = [], 0
    while True:
        if (run := _run_of(source)) is not None:
            runs.append(run)
        before = source.base or (str(run.facts.get("model") or "") if run else "")
        if not before:
            break
        source = resolve_model(before)
        steps += 1
    said = card_data(source.folder)
    base = source.published or _one(said.get("base_model"))
    license = {name: str(said[name]) for name in LICENCE_KEYS if said.get(name)}
    return Lineage(base, license, tuple(runs), source.published, steps)


def card_data(folder: Path) -> dict[str, Any]:
    """What the head of a folder's card says; nothing where there is none.

    Raises:
        CheckpointError: If it cannot be read.
    """
    path = folder / CARD
    if not path.is_file():
        return {}
    try:
        return dict(metadata_load(path) or {})
    except (yaml.YAMLError, ValueError, TypeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"The head of {path} cannot be read: {error}", expected="YAML between two ---") from error


def _run_of(source: ModelSource) -> RunRecord | None:
    """The run whose directory a model lies in."""
    folder = source.folder.parent
    return RunRecord.read(folder) if (folder / "run.json").is_file() and (folder / "config.yaml").is_file() else None


def _one(value: Any) -> str | None:
    """Cards name one base, or a list of them."""
    if isinstance(value, list):
        value = value[0] if value else None
    return str(value) if value else None

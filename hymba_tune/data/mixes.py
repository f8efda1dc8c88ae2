"""Several sources, each with its weight and its cap: from flags, or from a YAML file that stands for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from hymba_tune.data.formats import Names
from hymba_tune.data.rows import listing
from hymba_tune.data.sources import Source, open_source
from hymba_tune.errors import ConfigError, DataError, did_you_mean

KINDS = (".yaml", ".yml")
KEYS = ("path", "weight", "max_rows", "map", "eval_data")
EXPECTED = f"a list of sources, each with path and at most {listing(KEYS[1:])}"


def open_sources(names: Sequence[str], weights: Sequence[float] = (), caps: Sequence[int] = ()) -> list[Source]:
    """Find every source.

    Args:
        names: As `open_source` takes them, or files that `open_mix` reads.
        weights: As many as names, or none: how often each source's rows are taken.
        caps: As many as names, or none: after how many rows each source ends.

    Raises:
        ConfigError: If weights or caps are not as many, or not positive.
        DataError: If a source is not found, or is of no known kind.
    """
    for flag, values in {"--weights": weights, "--caps": caps}.items():
        if values and len(values) != len(names):
            raise ConfigError(
                f"{flag} has {len(values)} {'value' if len(values) == 1 else 'values'}, --data {len(names)}.",
                expected="one for each source of --data, in their order",
            )
        for value in values:
            _positive(flag, value)
        if values and (mix := next(filter(_is_mix, names), None)):
            raise ConfigError(f"{flag} beside {mix}, which is a mix.", fix=f"write them in {mix}")
    sources: list[Source] = []
    for index, name in enumerate(names):
        if _is_mix(name):
            sources += open_mix(Path(name))
        else:
            weight = weights[index] if weights else 1.0
            sources.append(replace(open_source(name), weight=weight, max_rows=caps[index] if caps else None))
    return sources


def open_mix(path: Path) -> list[Source]:
    """Read a mix: a YAML list of sources.

    Each is a mapping of ``path`` (a file beside the mix, or whatever else `open_source` takes), and at most
    ``weight``, ``max_rows``, ``map`` (names of columns and roles that only it has) and ``eval_data`` (its own held-out
    data, in the same columns).

    Raises:
        DataError: If it cannot be read, or says something else.
        ConfigError: If a weight, a cap or a mapping cannot be used.
    """
    return [
        _source(entry, f"{path}, source {number}", path.parent) for number, entry in enumerate(_entries(path), start=1)
    ]


def local_files(names: Sequence[str]) -> list[Path]:
    """The files of this machine that names of sources stand for, those of mixes included. No data is read.

    Args:
        names: As `open_sources` takes them; names of anything else are left out.

    Raises:
        DataError: If a mix cannot be read.
    """
    files = []
    for path in (Path(name).expanduser() for name in names):
        files.append(path)
        if _is_mix(str(path)):
            entries = [entry for entry in _entries(path) if isinstance(entry, dict)]
            named = [str(entry[key]) for entry in entries for key in ("path", "eval_data") if key in entry]
            files += [path.parent / Path(name).expanduser() for name in named]
            files += [Path(name).expanduser() for name in named]
    return [path for path in files if path.is_file()]


def _entries(path: Path) -> list[Any]:
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"Cannot read the mix {path}: {error}.", expected=EXPECTED) from error
    if not isinstance(entries, list) or not entries:
        raise DataError(f"Cannot use the mix {path}: it is no list.", expected=EXPECTED)
    return entries


def _source(entry: Any, where: str, folder: Path) -> Source:
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
        raise DataError(f"Cannot use {where}: it has no path.", expected=EXPECTED)
    for key in entry:
        if key not in KEYS:
            what = f'Cannot use {where}: there is no "{key}".'
            raise DataError(what, expected=EXPECTED, fix=did_you_mean(str(key), KEYS))
    mapping = entry.get("map") or {}
    if not isinstance(mapping, dict):
        raise DataError(f"Cannot use {where}: its map is no mapping.", expected="such as {prompt: question}")
    mapping = {str(key): str(value) for key, value in mapping.items()}
    Names.parse(mapping)
    source = replace(_beside(entry["path"], folder), mapping=mapping)
    if "weight" in entry:
        source = replace(source, weight=float(_positive(f"{where}: weight", entry["weight"])))
    if "max_rows" in entry:
        source = replace(source, max_rows=_positive(f"{where}: max_rows", entry["max_rows"], whole=True))
    if "eval_data" in entry:
        source = replace(source, held_out=replace(_beside(str(entry["eval_data"]), folder), mapping=mapping))
    return source


def _beside(name: str, folder: Path) -> Source:
    """A source of a mix: a file beside it, or what a name stands for anywhere."""
    beside = folder / Path(name).expanduser()
    return open_source(str(beside) if beside.exists() else name)


def _is_mix(name: str) -> bool:
    return Path(name).suffix.lower() in KINDS and Path(name).is_file()


def _positive(what: str, value: Any, *, whole: bool = False) -> Any:
    kind = "whole number" if whole else "number"
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        raise ConfigError(f"{what} {value!r} is no {kind}.", expected=f"a {kind} above 0")
    if not 0 < value < float("inf"):
        raise ConfigError(
            f"{what} {value} is not above 0.",
            expected=f"a {kind} above 0",
            fix="leave the source out to take none of it",
        )
    return value

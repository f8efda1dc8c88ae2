"""Opens several sources with their weights and caps: from flags, or from a mix, a YAML file that lists them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hymba_tune.config.base import MAX_NUMBER, MAX_WEIGHT
from hymba_tune.data.formats import Names
from hymba_tune.data.rows import listing
from hymba_tune.data.sources import Source, open_source
from hymba_tune.errors import ConfigError, DataError, did_you_mean, shortened
from hymba_tune.files import read_yaml

KINDS = (".yaml", ".yml")
KEYS = ("path", "weight", "max_rows", "map", "eval_data")
EXPECTED = f"a list of sources, each with path and at most {listing(KEYS[1:])}"


def open_sources(
    names: Sequence[str], weights: Sequence[float] = (), caps: Sequence[int] = (), *, escape: bool = False
) -> list[Source]:
    """Open every source.

    Args:
        names: Names for `open_source`, or files for `open_mix`.
        weights: Sampling weights, one for each name, or none.
        caps: Maximum rows, one for each name, or none.
        escape: Whether special tokens inside texts are written as plain text.

    Raises:
        ConfigError: If the number of weights or caps is wrong, or one is not positive.
        DataError: If a source does not exist, or its file type is unknown.
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
            raise ConfigError(f"{flag} cannot be used with {mix}, which is a mix.", fix=f"write them in {mix}")

    sources: list[Source] = []
    for index, name in enumerate(names):
        if _is_mix(name):
            sources += open_mix(Path(name))
        else:
            weight = weights[index] if weights else 1.0
            sources.append(replace(open_source(name), weight=weight, max_rows=caps[index] if caps else None))
    return [escaped(source) for source in sources] if escape else sources


def escaped(source: Source) -> Source:
    """Return a source, and its evaluation data, with special tokens inside texts written as plain text."""
    return replace(source, escape=True, held_out=source.held_out and escaped(source.held_out))


def open_mix(path: Path) -> list[Source]:
    """Read a mix: a YAML list of sources.

    Each source is a mapping with ``path`` (a file relative to the mix, or any name for `open_source`), and optionally
    ``weight``, ``max_rows``, ``map`` (its column and role names) and ``eval_data`` (its held-out data, with the same
    columns).

    Raises:
        DataError: If the file cannot be read, or its content is not a mix.
        ConfigError: If a weight, a cap or a mapping cannot be used.
    """
    return [
        _source(entry, f"{path}, source {number}", path.parent) for number, entry in enumerate(_entries(path), start=1)
    ]


def local_files(names: Sequence[str]) -> list[Path]:
    """Return the local files behind names of sources, including those of mixes. No data is read.

    Args:
        names: Names for `open_sources`; those that are not files are ignored.

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
    inside = [file for path in files if path.is_dir() for file in (*path.glob("*"), *path.glob("*/*"))]
    return [path for path in (*files, *inside) if path.is_file()]


def _entries(path: Path) -> list[Any]:
    try:
        entries = read_yaml(path)
    except ValueError as error:
        raise DataError(f"Cannot read the mix {path}: {error}.", expected=EXPECTED) from error
    if not isinstance(entries, list) or not entries:
        raise DataError(f"Cannot use the mix {path}: it is not a list.", expected=EXPECTED)
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
        raise DataError(f"Cannot use {where}: its map is not a mapping.", expected="such as {prompt: question}")
    mapping = {str(key): str(value) for key, value in mapping.items()}
    Names.parse(mapping)

    source = replace(_open_relative(entry["path"], folder), mapping=mapping)
    if "weight" in entry:
        source = replace(source, weight=float(_positive(f"{where}: weight", entry["weight"])))
    if "max_rows" in entry:
        source = replace(source, max_rows=_positive(f"{where}: max_rows", entry["max_rows"], whole=True))
    if "eval_data" in entry:
        source = replace(source, held_out=replace(_open_relative(str(entry["eval_data"]), folder), mapping=mapping))
    return source


def _open_relative(name: str, folder: Path) -> Source:
    """Open a source of a mix: a file relative to the mix's folder, or any name for `open_source`."""
    path = folder / Path(name).expanduser()
    return open_source(str(path) if path.exists() else name)


def _is_mix(name: str) -> bool:
    return Path(name).suffix.lower() in KINDS and Path(name).is_file()


def _positive(what: str, value: Any, *, whole: bool = False) -> Any:
    kind = "whole number" if whole else "number"
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        raise ConfigError(f"{what} {value!r} is not a {kind}.", expected=f"a {kind} above 0")
    if not 0 < value <= (MAX_NUMBER if whole else MAX_WEIGHT):
        raise ConfigError(
            f"{what} {shortened(str(value))} is {'too large' if value > 0 else 'not above 0'}.",
            expected=f"a {kind} above 0, at most {MAX_NUMBER if whole else MAX_WEIGHT:,}",
            fix="" if value > 0 else "remove the source to use none of its rows",
        )
    return value

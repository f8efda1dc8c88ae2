"""Divides files into training and evaluation data, with no prompt in both."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hymba_tune.config import OnBadRow
from hymba_tune.data.duplicates import prompt_hash, text_hash
from hymba_tune.data.encoding import read_example
from hymba_tune.data.formats import Names
from hymba_tune.data.rows import RowError, SourceRow, listing
from hymba_tune.data.sources import Source
from hymba_tune.data.writers import check_target, writing
from hymba_tune.errors import DataError
from hymba_tune.files import make_folders, remove_empty, write_errors

TRAIN, EVAL = "train.jsonl", "eval.jsonl"
PROGRESS_ROWS = 1000


@dataclass
class Divided:
    """Counts of divided rows.

    Attributes:
        train: Rows of ``train.jsonl``.
        held_out: Rows of ``eval.jsonl``.
        unreadable: Rows that could not be read and are in neither file.
    """

    train: int = 0
    held_out: int = 0
    unreadable: int = 0


def divide(
    sources: Sequence[Source],
    fraction: float,
    out: Path,
    *,
    seed: int = 0,
    mapping: Mapping[str, str] | None = None,
    on_bad_row: OnBadRow = OnBadRow.stop,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Divided:
    """Write ``train.jsonl`` and ``eval.jsonl`` with unchanged rows in their original order.

    Rows whose prompts differ only in case and punctuation go to the same file. Reads everything twice, and stores 8
    bytes per row in between.

    Args:
        sources: The sources, read one after the other.
        fraction: Share of the rows for ``eval.jsonl``, in ``(0, 1)``.
        out: The folder; created if necessary.
        seed: Random seed; the same seed gives the same division.
        mapping: Column and role names, as for `Names.parse`.
        on_bad_row: What to do with a row that cannot be read. A row that matches no format is grouped by its content.
        overwrite: Whether existing files are replaced.
        progress: Called with the number of rows read so far, at intervals.

    Raises:
        RowError: At a row that cannot be read, if ``on_bad_row`` is ``stop``. Nothing is written then.
        DataError: If a source cannot be read, or all rows have one prompt.
        ConfigError: If ``out`` cannot be written.
    """
    with write_errors("--out", out):
        created = make_folders(out)
    try:
        return _divide(sources, fraction, out, seed, mapping or {}, on_bad_row, progress, overwrite=overwrite)
    finally:
        remove_empty(created)


def check_divided(out: Path, *, overwrite: bool = False, inputs: Sequence[Path] = ()) -> None:
    """Check that `divide` can write into a folder, which need not exist.

    Args:
        out: The folder.
        overwrite: Whether existing files are replaced.
        inputs: The files that are read.

    Raises:
        ConfigError: If a file cannot be written.
    """
    if out.is_dir():
        for name in (TRAIN, EVAL):
            check_target(out / name, overwrite=overwrite, inputs=inputs)


def _divide(
    sources: Sequence[Source],
    fraction: float,
    out: Path,
    seed: int,
    mapping: Mapping[str, str],
    on_bad_row: OnBadRow,
    progress: Callable[[int], None] | None,
    *,
    overwrite: bool,
) -> Divided:
    check_divided(out, overwrite=overwrite)
    groups = array("Q")
    for row, names in _rows(sources, mapping):
        if row.error and on_bad_row is OnBadRow.stop:
            raise RowError(row.place, row.error, extent="leaves it out")
        groups.append(0 if row.error else _group(row, names))
        if progress and len(groups) % PROGRESS_ROWS == 0:
            progress(len(groups))
    is_held_out = _held_out(np.frombuffer(groups, dtype=np.uint64), fraction, seed, sources)
    done = Divided()
    with (
        writing(out / TRAIN, {}, overwrite=overwrite) as train,
        writing(out / EVAL, {}, overwrite=overwrite) as held_out,
    ):
        for (row, _), to_eval in zip(_rows(sources, mapping), is_held_out, strict=True):
            try:
                if row.error:
                    done.unreadable += 1
                elif to_eval:
                    held_out(row.value)
                    done.held_out += 1
                else:
                    train(row.value)
                    done.train += 1
            except DataError as problem:
                raise RowError(row.place, problem) from problem
    return done


def _rows(sources: Sequence[Source], mapping: Mapping[str, str]) -> Iterator[tuple[SourceRow, Names]]:
    for source in sources:
        names = Names.parse({**mapping, **source.mapping})
        yield from ((row, names) for row in source)


def _group(row: SourceRow, names: Names) -> int:
    """Hash what rows of one group share: the prompt, or the whole row if it matches no format."""
    try:
        return prompt_hash(read_example(row, names))
    except DataError:
        value = row.value
        prompt = value.get("prompt") if isinstance(value, Mapping) else None
        return text_hash(json.dumps(value if prompt is None else prompt, sort_keys=True, default=str))


def _held_out(groups: np.ndarray, fraction: float, seed: int, sources: Sequence[Source]) -> np.ndarray:
    """Mark the rows to hold out: whole groups in random order, up to the share of the rows."""
    distinct, group_of, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    if len(distinct) < 2:
        raise DataError(
            f"Cannot divide {listing(source.name for source in sources)}: all rows have the same prompt.",
            expected="at least two different ones",
        )
    order = np.random.default_rng(seed).permutation(len(distinct))
    middles = np.cumsum(sizes[order]) - sizes[order] / 2  # a group is held out if more than half of it fits
    count = min(max(1, int(np.searchsorted(middles, fraction * len(groups)))), len(distinct) - 1)
    held_out = np.zeros(len(distinct), dtype=bool)
    held_out[order[:count]] = True
    return np.asarray(held_out[group_of])

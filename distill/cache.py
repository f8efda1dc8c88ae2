"""A teacher's targets on disk: made once, found again by later runs, gone on with after a kill.

A folder holds ``key.json``, all that decides what the targets are; ``00000.arrow`` and so on, `SHARD` rows each; and
``done.json`` once all are there. A shard is written aside and renamed, so that one that is there is whole. A
probability takes two bytes, as does a piece; compression takes more off than all the rest adds.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from hymba_tune.distill.projection import SparseTarget
from hymba_tune.distill.rows import alignment
from hymba_tune.distill.target_maker import CaptureStats, TargetMaker
from hymba_tune.distill.targets import Targets
from hymba_tune.errors import CheckpointError, ConfigError, DataError

VERSION = 1
"""Of what the files mean, part of every key."""
SHARD = 256
"""Rows that are written at once: what a kill may cost."""
GROUP = 8
"""Rows that are read at once."""
KEY, DONE = "key.json", "done.json"
FLAG = "--teacher-cache"
WIDE = 65536
"""Vocabularies of more than this take four bytes a piece."""

Key = Mapping[str, Any]
Columns = dict[str, NDArray[Any]]


class TargetCache(Sequence[Targets]):
    """The targets of rows, read as they are asked for; it may be pickled and read in several processes.

    Args:
        folder: That `fill` has filled.

    Raises:
        CheckpointError: If it is not full, or cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._key, done = _read(folder / KEY), _read(folder / DONE)
        try:
            self._rows, self.kept = int(done["rows"]), CaptureStats(**done["kept"])
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(folder / DONE, error) from error
        self._open: dict[int, pa.RecordBatchFileReader] = {}

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, row: Any) -> Any:
        """The targets of a row.

        Raises:
            CheckpointError: If their file cannot be read.
        """
        if not 0 <= row < self._rows:
            raise IndexError(f"row {row} of {self._rows}")
        shard, place = divmod(row, SHARD)
        group, index = divmod(place, GROUP)
        try:
            if shard not in self._open:
                self._open[shard] = open_shard(shard_path(self.folder, shard))
            return _decode(self._open[shard].get_batch(group), index, self._key["top_k"])
        except (OSError, pa.ArrowException) as error:
            raise _damaged(shard_path(self.folder, shard), error) from error

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_open": {}}

    @property
    def bytes(self) -> int:
        """What it takes on disk."""
        return sum(file.stat().st_size for file in self.folder.iterdir())


def check_key(folder: Path, key: Key) -> None:
    """See that what a folder holds was made with this key.

    Args:
        folder: Need not exist.
        key: All that decides what the targets are, by names that people understand.

    Raises:
        ConfigError: If it holds something else, naming what differs.
        CheckpointError: If its key cannot be read.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / KEY).is_file():
        raise ConfigError(
            f"{FLAG} {folder} holds something else.", expected="a new or empty folder, or one that a teacher filled"
        )
    made, wanted = _read(folder / KEY), json.loads(json.dumps(key))
    differing = [name for name in {**wanted, **made} if made.get(name) != wanted.get(name)]
    if differing:
        first = differing[0]
        raise ConfigError(
            f"{FLAG} {folder} was made with another {' and another '.join(differing)}.",
            expected=f"{first} {_shown(wanted.get(first))}, which it has as {_shown(made.get(first))}",
            fix=f"another folder for these settings, or none; or the settings it was made with; or remove {folder}",
        )


def key_digest(key: Key) -> str:
    """A name for a folder of targets."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]


def is_full(folder: Path) -> bool:
    """Whether a folder holds the targets of all its rows."""
    return (folder / DONE).is_file()


def fill(
    folder: Path, key: Key, rows: datasets.Dataset, maker: TargetMaker, progress: Callable[[int], None]
) -> TargetCache:
    """Have a teacher's targets of all rows, those that the folder holds already left out.

    Args:
        folder: New, or filled in part with the same key.
        key: See `check_key`.
        rows: As `read_rows` gives them.
        maker: Of the targets.
        progress: Called with the number of rows that are done.

    Raises:
        ConfigError: If the folder holds something else.
        DataError: If the disk is full; what was done stays.
    """
    check_key(folder, key)
    try:
        _fill(folder, key, rows, maker, progress)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DataError(
            f"The disk of {folder} is full.", fix="free some of it and start again: what is there is gone on with"
        ) from error
    return TargetCache(folder)


def _fill(folder: Path, key: Key, rows: datasets.Dataset, maker: TargetMaker, progress: Callable[[int], None]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / KEY, json.dumps(key, indent=2))
    kept, done = CaptureStats(), 0
    for shard in range(-(-len(rows) // SHARD)):
        path = shard_path(folder, shard)
        part = rows.select(range(shard * SHARD, min((shard + 1) * SHARD, len(rows))))
        shown = _kept_in(path)
        if shown is None:
            with _aside(path) as aside:
                shown = _write_shard(aside, part, maker, key, partial(_after, progress, done))
        kept.add(shown)
        done += len(part)
        progress(done)
    _write(folder / DONE, json.dumps({"rows": len(rows), "kept": asdict(kept)}))


def _after(progress: Callable[[int], None], before: int, count: int) -> None:
    progress(before + count)


def _write_shard(
    path: Path, rows: datasets.Dataset, maker: TargetMaker, key: Key, progress: Callable[[int], None]
) -> CaptureStats:
    wide = key["vocabulary"] > WIDE
    made: dict[int, Columns] = {}
    kept: dict[int, CaptureStats] = {}
    for index, taught in maker([alignment(row) for row in rows]):
        made[index], kept[index] = encode(taught.targets, wide), taught.kept
        progress(len(made))
    total = CaptureStats()
    for index in sorted(kept):  # in the rows' order: sums of floats depend on theirs
        total.add(kept[index])
    write_shard(path, [made[index] for index in sorted(made)], total)
    return total


def encode(targets: Targets, wide: bool) -> Columns:
    """A row's targets as they are stored: distances for ascending numbers, sixteen bits for logarithms."""
    student_tokens = targets.top.student_tokens.cpu().numpy()
    begins = targets.spans[:, 0].cpu().numpy()
    return {
        "gaps": np.diff(targets.at.cpu().numpy(), prepend=0).astype(np.uint32),
        "pieces": student_tokens.astype(np.uint32 if wide else np.uint16).ravel(),
        "steps": _steps(_halves(targets.top.log_probs)).ravel(),
        "bucket": _halves(targets.top.rest_mass),
        "span_gaps": np.diff(begins, prepend=0).astype(np.uint32),
        "span_sizes": targets.spans[:, 1].cpu().numpy().astype(np.uint32) - begins.astype(np.uint32),
        "span_log_likelihoods": _halves(targets.span_log_likelihoods),
    }


def _halves(values: Tensor) -> NDArray[np.float16]:
    halves: NDArray[np.float16] = values.float().cpu().numpy().astype(np.float16)
    return halves


def _steps(sorted_halves: NDArray[np.float16]) -> NDArray[np.uint16]:
    """Differences of the bits of each row: small numbers, where logarithms descend. They wrap around without loss."""
    bits = sorted_halves.view(np.uint16)
    return np.diff(bits, axis=1, prepend=np.zeros_like(bits[:, :1]))


def write_shard(path: Path, rows: Sequence[Columns], kept: CaptureStats) -> None:
    """Write rows, `GROUP` of them to a record batch, and what their pass has shown."""
    types = {name: pa.list_(pa.from_numpy_dtype(values.dtype)) for name, values in rows[0].items()}
    schema = pa.schema(types, metadata={"kept": json.dumps(asdict(kept))})
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema, options=options) as writer:
        for begin in range(0, len(rows), GROUP):
            group = rows[begin : begin + GROUP]
            columns = [_lists([row[name] for row in group], kind) for name, kind in types.items()]
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))


def _lists(rows: Sequence[NDArray[Any]], kind: pa.DataType) -> pa.Array:
    offsets = np.cumsum([0, *map(len, rows)]).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(rows)), type=kind)


def _decode(group: pa.RecordBatch, index: int, top_k: int) -> Targets:
    column = {name: group[name][index].values.to_numpy(zero_copy_only=False) for name in group.schema.names}

    def logs(halves: NDArray[Any]) -> Tensor:
        return torch.from_numpy(halves.astype(np.float32))

    at = torch.from_numpy(column["gaps"].astype(np.int64).cumsum())
    begin = torch.from_numpy(column["span_gaps"].astype(np.int64).cumsum())
    student_tokens = torch.from_numpy(column["pieces"].astype(np.int64)).view(len(at), top_k)
    bits = column["steps"].reshape(len(at), top_k).cumsum(1, dtype=np.uint16)
    return Targets(
        at,
        SparseTarget(student_tokens, logs(bits.view(np.float16)), logs(column["bucket"])),
        torch.stack([begin, begin + torch.from_numpy(column["span_sizes"].astype(np.int64))], 1),
        logs(column["span_log_likelihoods"]),
    )


def shard_path(folder: Path, shard: int) -> Path:
    """Where a shard lies."""
    return folder / f"{shard:05}.arrow"


def open_shard(path: Path) -> pa.RecordBatchFileReader:
    """A shard, memory-mapped."""
    return pa.ipc.open_file(pa.memory_map(str(path)))


def _kept_in(path: Path) -> CaptureStats | None:
    """What the pass over a shard has shown; None if the shard is not there, or damaged."""
    try:
        metadata = open_shard(path).schema.metadata
        return CaptureStats(**json.loads(metadata[b"kept"]))
    except (OSError, pa.ArrowException, ValueError, TypeError, KeyError):
        return None


@contextmanager
def _aside(path: Path) -> Iterator[Path]:
    """A file to write, which takes its name when it is whole and on the disk."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield part
        with part.open("rb+") as written:
            os.fsync(written.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _write(path: Path, content: str) -> None:
    with _aside(path) as part:
        part.write_text(content, encoding="utf-8")


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"The teacher's targets in {path} cannot be read: {error}",
        expected="a folder that hymba-tune distill capture has filled",
        fix="remove that file, and capture again: all others are kept",
    )


def _shown(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}…" if len(text) > 40 else text

"""A teacher's targets on disk: computed once, read by later runs, and continued after an interruption.

A folder contains ``key.json``, with everything that determines the targets; shards ``00000.arrow`` and so on, `SHARD`
rows each; and ``done.json`` once it is complete. A shard is written to a temporary file and renamed, so a shard with
its final name is complete. A probability takes two bytes and so does a token, before compression.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
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
from hymba_tune.files import REPLACED, FolderKind, atomic_write, entries, write_text

VERSION = 2
"""The version of the file format, which is part of every key."""
SHARD = 256
"""Rows in a shard, which is the most work that an interruption can lose."""
GROUP = 8
"""Rows that are read at a time."""
KEY, DONE = "key.json", "done.json"
FLAG = "--teacher-cache"
TARGETS = FolderKind("a folder of teacher's targets", {KEY: '"teacher"'}, (KEY, DONE, "?????.arrow", f"{REPLACED}.*"))
WIDE = 65536
"""Vocabularies larger than this take four bytes for a token."""

Key = Mapping[str, Any]
Columns = dict[str, NDArray[Any]]


class TargetCache(Sequence[Targets]):
    """The targets of rows, read on access. It can be pickled and read in several processes.

    Args:
        folder: A folder that `fill` has completed.

    Raises:
        CheckpointError: If the folder is incomplete or cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._key, done = _read(folder / KEY), _read(folder / DONE)
        try:
            self._rows, self.stats = int(done["rows"]), CaptureStats(**done["kept"])
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(folder / DONE, error) from error
        self._open: dict[int, pa.RecordBatchFileReader] = {}

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, row: Any) -> Any:
        """Return the targets of a row.

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
        """The size on disk."""
        return sum(file.stat().st_size for file in self.folder.iterdir())


def check_key(folder: Path, key: Key) -> None:
    """Check that a folder is empty or has targets of this key.

    Args:
        folder: The folder, which need not exist.
        key: Everything that determines the targets, by names that a user understands.

    Raises:
        ConfigError: If the folder has something else; the message names the difference.
        CheckpointError: If the folder's key cannot be read.
    """
    if not folder.exists() or (folder.is_dir() and _is_empty(folder)):
        return
    if not (folder / KEY).is_file():
        raise ConfigError(
            f"{FLAG} {folder} is not a folder of targets.", expected="a new or empty folder, or one of captured targets"
        )
    stored = _read(folder / KEY)
    wanted = json.loads(json.dumps(key))
    differing = [name for name in {**wanted, **stored} if stored.get(name) != wanted.get(name)]
    if differing:
        first = differing[0]
        raise ConfigError(
            f"{FLAG} {folder} was made with another {' and another '.join(differing)}.",
            expected=f"{first} {_shown(wanted.get(first))}, which it has as {_shown(stored.get(first))}",
            fix=f"another folder for these settings, or none; or the settings it was made with; or remove {folder}",
        )


def _is_empty(folder: Path) -> bool:
    """Whether a folder holds nothing, apart from targets that are being replaced."""
    return all(path.name.startswith(f"{REPLACED}.") for path in entries(folder))


def key_digest(key: Key) -> str:
    """Return a folder name for the targets of a key."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]


def is_full(folder: Path) -> bool:
    """Return whether a folder has the targets of all its rows."""
    return (folder / DONE).is_file()


def fill(
    folder: Path, key: Key, rows: datasets.Dataset, maker: TargetMaker, progress: Callable[[int], None]
) -> TargetCache:
    """Compute a teacher's targets for all rows that are not in the folder yet.

    Args:
        folder: A new folder, or a partly filled one with the same key.
        key: Everything that determines the targets; see `check_key`.
        rows: The rows from `read_rows`.
        maker: Computes the targets.
        progress: Called with the number of rows that are done.

    Raises:
        ConfigError: If the folder has something else.
        DataError: If the disk is full. The completed shards stay.
    """
    check_key(folder, key)
    try:
        _fill(folder, key, rows, maker, progress)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DataError(
            f"The disk of {folder} is full.",
            fix="free some space and start again: the run continues from the completed shards",
        ) from error
    return TargetCache(folder)


def _fill(folder: Path, key: Key, rows: datasets.Dataset, maker: TargetMaker, progress: Callable[[int], None]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / KEY, json.dumps(key, indent=2))
    total = CaptureStats()
    done = 0
    for shard in range(-(-len(rows) // SHARD)):
        path = shard_path(folder, shard)
        part = rows.select(range(shard * SHARD, min((shard + 1) * SHARD, len(rows))))
        # A damaged shard counts as missing and is computed again.
        stats = _stats_of(path)
        if stats is None:
            with atomic_write(path) as temporary:
                stats = _write_shard(temporary, part, maker, key, partial(_after, progress, done))
        total.add(stats)
        done += len(part)
        progress(done)
    write_text(folder / DONE, json.dumps({"rows": len(rows), "kept": asdict(total)}))


def _after(progress: Callable[[int], None], before: int, count: int) -> None:
    progress(before + count)


def _write_shard(
    path: Path, rows: datasets.Dataset, maker: TargetMaker, key: Key, progress: Callable[[int], None]
) -> CaptureStats:
    wide = key["vocabulary"] > WIDE
    columns: dict[int, Columns] = {}
    stats: dict[int, CaptureStats] = {}
    for index, batch in maker([alignment(row) for row in rows]):
        columns[index] = encode(batch.targets, wide)
        stats[index] = batch.stats
        progress(len(columns))

    # The teacher reads rows by length. The file and the sums of floats must not depend on that order.
    total = CaptureStats()
    for index in sorted(stats):
        total.add(stats[index])
    write_shard(path, [columns[index] for index in sorted(columns)], total)
    return total


def encode(targets: Targets, wide: bool) -> Columns:
    """Turn a row's targets into columns: differences of ascending numbers, and logarithms in 16 bits."""
    student_tokens = targets.top.student_tokens.cpu().numpy()
    begins = targets.spans[:, 0].cpu().numpy()
    # The column names are part of the file format.
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
    """Return differences of the bits in each row, which are small where logarithms descend; overflow is lossless."""
    bits = sorted_halves.view(np.uint16)
    return np.diff(bits, axis=1, prepend=np.zeros_like(bits[:, :1]))


def write_shard(path: Path, rows: Sequence[Columns], stats: CaptureStats) -> None:
    """Write rows, `GROUP` in each record batch, and the statistics of their pass."""
    types = {name: pa.list_(pa.from_numpy_dtype(values.dtype)) for name, values in rows[0].items()}
    schema = pa.schema(types, metadata={"kept": json.dumps(asdict(stats))})
    options = pa.ipc.IpcWriteOptions(compression="zstd")

    # A group is the unit of reading and of compression: large enough to compress, small enough to read for one row.
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
    """Return the path of a shard."""
    return folder / f"{shard:05}.arrow"


def open_shard(path: Path) -> pa.RecordBatchFileReader:
    """Open a shard, memory-mapped."""
    return pa.ipc.open_file(pa.memory_map(str(path)))


def _stats_of(path: Path) -> CaptureStats | None:
    """Return the statistics of a shard; None if the shard is missing or damaged."""
    try:
        metadata = open_shard(path).schema.metadata
        return CaptureStats(**json.loads(metadata[b"kept"]))
    except (OSError, pa.ArrowException, ValueError, TypeError, KeyError):
        return None


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"The teacher's targets in {path} cannot be read: {error}",
        expected="a folder that hymba-tune distill capture has completed",
        fix="remove that file and capture again: all other files stay",
    )


def _shown(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}…" if len(text) > 40 else text

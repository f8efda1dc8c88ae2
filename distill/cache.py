"""A teacher's targets on disk: computed once, read by later runs, and continued after an interruption.

A folder contains ``key.json``, with everything that determines the targets; shards ``00000.arrow`` and so on, `SHARD`
rows each; and ``done.json`` once it is complete. A shard is written to a temporary file and renamed, so a shard with
its final name is complete. Several processes can fill a folder together, on any machines that share it. A probability
takes two bytes and so does a token, before compression. Each row is compressed on its own, so that reading one in any
order decodes no other.
"""

from __future__ import annotations

import errno
import hashlib
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
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
from hymba_tune.distributed.shared_files import make_once, make_together
from hymba_tune.errors import CheckpointError, ConfigError, DataError
from hymba_tune.files import PARTIAL, REPLACED, FolderKind, atomic_write, entries, remove_leftovers, write_text

VERSION = 2
"""The version of the file format, which is part of every key."""
SHARD = 256
"""Rows in a shard, which is the most work that an interruption can lose."""
SHARDS = "?????.arrow"
"""The pattern of the shards' names."""
CODEC = "zstd"
KEY, DONE = "key.json", "done.json"
FLAG = "--teacher-cache"
TARGETS = FolderKind(
    "a folder of teacher's targets", {KEY: '"teacher"'}, (KEY, DONE, SHARDS, "*.lock", f"{REPLACED}.*")
)
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
        self._open: dict[int, pa.RecordBatch] = {}

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
        try:
            if shard not in self._open:
                self._open[shard] = open_shard(shard_path(self.folder, shard)).get_batch(0)
            stored = {name: column[place] for name, column in zip(_COLUMNS, self._open[shard].columns, strict=True)}
            return _decode(stored, self._key["top_k"], self._key["vocabulary"] > WIDE)
        except (OSError, ValueError, IndexError, pa.ArrowException) as error:
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
    """Whether a folder holds nothing, apart from targets that are being replaced and a key that is being written."""
    return all(path.name.startswith((f"{REPLACED}.", f"{KEY}.")) for path in entries(folder))


def key_digest(key: Key) -> str:
    """Return a folder name for the targets of a key."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]


def is_full(folder: Path) -> bool:
    """Return whether a folder has the targets of all its rows."""
    return (folder / DONE).is_file()


def fill(
    folder: Path, key: Key, rows: datasets.Dataset, maker: TargetMaker, progress: Callable[[int], None]
) -> TargetCache:
    """Compute a teacher's targets for all rows that are not in the folder yet, together with all processes that do so.

    Args:
        folder: A new folder, or a partly filled one with the same key.
        key: Everything that determines the targets; see `check_key`.
        rows: The rows from `read_rows`.
        maker: Computes the targets.
        progress: Called with the number of rows that are done, whoever has done them.

    Raises:
        ConfigError: If the folder has something else.
        DataError: If the disk is full. The completed shards stay.
    """
    check_key(folder, key)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        make_once(folder / KEY, lambda: write_text(folder / KEY, json.dumps(key, indent=2)))
        check_key(folder, key)  # another process may have been first, with other settings
        _Filling(folder, key, rows, maker, progress).fill()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DataError(
            f"The disk of {folder} is full.",
            fix="free some space and start again: the run continues from the completed shards",
        ) from error
    return TargetCache(folder)


@dataclass
class _Filling:
    """The work of one process on the targets of rows; see `fill`.

    Attributes:
        stats: The statistics of the shards that are known to be complete.
        done: The number of rows in complete shards when this was last looked up.
    """

    folder: Path
    key: Key
    rows: datasets.Dataset
    maker: TargetMaker
    progress: Callable[[int], None]
    stats: dict[int, CaptureStats] = field(default_factory=dict)
    done: int = 0

    def fill(self) -> None:
        paths = [shard_path(self.folder, shard) for shard in range(-(-len(self.rows) // SHARD))]
        self._count()
        make_together(paths, self._is_complete, self._make, self._count)
        make_once(self.folder / DONE, self._close)
        self._count()

    def _is_complete(self, shard: int) -> bool:
        """Whether a shard is there. A damaged one counts as missing and is computed again."""
        if shard not in self.stats and (found := _stats_of(shard_path(self.folder, shard))) is not None:
            self.stats[shard] = found
        return shard in self.stats

    def _make(self, shard: int) -> None:
        path = shard_path(self.folder, shard)
        part = self.rows.select(range(shard * SHARD, min((shard + 1) * SHARD, len(self.rows))))
        with atomic_write(path, alone=False) as temporary:
            stats = _write_shard(temporary, part, self.maker, self.key, lambda count: self.progress(self.done + count))
        self.stats[shard] = stats
        self._count()

    def _count(self) -> None:
        shards = {path.name for path in self.folder.glob(SHARDS)}
        last = (len(self.rows) - 1) // SHARD
        lacking = SHARD * (last + 1) - len(self.rows) if shard_path(self.folder, last).name in shards else 0
        self.done = SHARD * len(shards) - lacking
        self.progress(self.done)

    def _close(self) -> None:
        for left in self.folder.glob(f"{SHARDS}.*{PARTIAL}"):
            remove_leftovers(self.folder / left.name[: len(SHARDS)])
        total = CaptureStats()
        for shard in sorted(self.stats):
            total.add(self.stats[shard])
        write_text(self.folder / DONE, json.dumps({"rows": len(self.rows), "kept": asdict(total)}))


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


_COLUMNS = {
    "tokens": pa.uint32(),
    "spans": pa.uint32(),
    "checksum": pa.uint32(),
    "content": pa.large_binary(),
}
"""The columns of a shard: the numbers of a row's tokens and spans, and its columns one after the other, compressed."""


def write_shard(path: Path, rows: Sequence[Columns], stats: CaptureStats) -> None:
    """Write rows, and the statistics of their pass."""
    schema = pa.schema(_COLUMNS, metadata={"kept": json.dumps(asdict(stats))})
    contents = [pa.compress(b"".join(map(bytes, row.values())), codec=CODEC, asbytes=True) for row in rows]
    columns: list[Sequence[Any]] = [
        [len(row["gaps"]) for row in rows],
        [len(row["span_gaps"]) for row in rows],
        [zlib.crc32(content) for content in contents],
        contents,
    ]
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        arrays = [pa.array(column, kind) for column, kind in zip(columns, _COLUMNS.values(), strict=True)]
        writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))


def _decode(stored: Mapping[str, pa.Scalar], top_k: int, wide: bool) -> Targets:
    tokens, spans = stored["tokens"].as_py(), stored["spans"].as_py()
    sizes = {
        "gaps": (np.uint32, tokens),
        "pieces": (np.uint32 if wide else np.uint16, tokens * top_k),
        "steps": (np.uint16, tokens * top_k),
        "bucket": (np.float16, tokens),
        "span_gaps": (np.uint32, spans),
        "span_sizes": (np.uint32, spans),
        "span_log_likelihoods": (np.float16, spans),
    }
    content = stored["content"].as_buffer()
    if zlib.crc32(content) != stored["checksum"].as_py():
        raise ValueError("its checksum differs, so that its bytes have changed")
    size = sum(np.dtype(kind).itemsize * count for kind, count in sizes.values())
    content, at, column = pa.decompress(content, size, codec=CODEC), 0, {}
    for name, (kind, count) in sizes.items():
        column[name] = np.frombuffer(content, kind, count, at)
        at += column[name].nbytes

    def logs(halves: NDArray[Any]) -> Tensor:
        return torch.from_numpy(halves.astype(np.float32))

    positions = torch.from_numpy(column["gaps"].astype(np.int64).cumsum())
    begin = torch.from_numpy(column["span_gaps"].astype(np.int64).cumsum())
    bits = column["steps"].reshape(tokens, top_k).cumsum(1, dtype=np.uint16)
    return Targets(
        positions,
        SparseTarget(
            torch.from_numpy(column["pieces"].astype(np.int64)).view(tokens, top_k),
            logs(bits.view(np.float16)),
            logs(column["bucket"]),
        ),
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

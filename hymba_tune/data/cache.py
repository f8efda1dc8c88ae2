"""Encoded data that is kept between runs: found again by what went into it, written aside and renamed.

Several processes may use it at a time. An entry that another one removes stays readable for those that have it open.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tokenizers

from hymba_tune.data.sources import Source
from hymba_tune.files import flush_to_disk

if TYPE_CHECKING:  # importing transformers imports torch
    from transformers import PreTrainedTokenizerBase

Kept = Literal["data", "targets", "answers", "pairs"]
KEPT: dict[Kept, str] = {
    "data": "encoded data",
    "targets": "what teachers give the next tokens",
    "answers": "what teachers wrote",
    "pairs": "tables of two tokenizers",
}
"""What lies in the user's cache, in words."""
LIMIT_BYTES = 20 * 2**30
"""Encoded data that is kept at most: entries that were not used for longest go first."""
STALE_SECONDS = 2 * 24 * 3600
"""Age at which something unfinished is taken for left behind."""
UNFINISHED = "unfinished-"


def cache_folder(kind: Kept = "data") -> Path:
    """Where something is kept: ``hymba-tune/KIND`` in the user's cache (``XDG_CACHE_HOME``, or ``~/.cache``)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "hymba-tune", kind)


def entry_key(sources: Sequence[Source], tokenizer: PreTrainedTokenizerBase, **settings: Any) -> str | None:
    """A name made of everything that decides which rows come out, this code included.

    Args:
        sources: Their contents count, and their names, under which rows are listed.
        tokenizer: Its vocabulary and template count.
        settings: Whatever else does; must be writable as JSON.

    Returns:
        64 hexadecimal digits; `None` if a source cannot say what it holds without being read as rows.
    """
    contents = [source.content() if source.content else None for source in sources]
    if None in contents:
        return None
    parts = {
        "sources": [
            [source.name, content, source.weight, source.max_rows, dict(source.mapping)]
            for content, source in zip(contents, sources, strict=True)
        ],
        "tokenizer": [tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, tokenizer.special_tokens_map],
        "settings": settings,
        "code": [_own_code(), tokenizers.__version__],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


@cache
def _own_code() -> str:
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def writable(folder: Path | None) -> Path:
    """The folder, made if need be; one that goes when Python ends if it is `None` or cannot be written."""
    if folder is not None:
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
            return folder
    folder = Path(tempfile.mkdtemp(prefix="hymba-tune-data-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def unfinished(folder: Path) -> tempfile.TemporaryDirectory[str]:
    """A folder to write an entry in."""
    return tempfile.TemporaryDirectory(dir=folder, prefix=UNFINISHED)


def keep(written: Path, folder: Path, name: str) -> Path:
    """Move a finished entry to its name. If another process was faster, its entry is the one."""
    entry = folder / name
    flush_to_disk(written)
    try:
        written.rename(entry)
    except OSError:
        if not entry.is_dir():
            raise
    _trim(folder, keep=entry)
    return entry


def touch(entry: Path) -> None:
    """Remember that an entry was used."""
    with suppress(OSError):
        os.utime(entry)


def clear(folder: Path) -> tuple[int, int]:
    """Remove every entry.

    Returns:
        How many there were, and their bytes.
    """
    entries = list(folder.iterdir()) if folder.is_dir() else []
    size = sum(map(_size, entries))
    for entry in entries:
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
    return sum(not entry.name.startswith(UNFINISHED) for entry in entries), size


def _trim(folder: Path, keep: Path) -> None:
    entries = []
    for path in folder.iterdir():
        with suppress(OSError):  # another process removed it
            used = path.stat().st_mtime
            if not path.name.startswith(UNFINISHED):
                entries.append((used, path))
            elif used < time.time() - STALE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
    total = sum(_size(path) for _, path in entries)
    for _, path in sorted(entries):
        if total <= LIMIT_BYTES:
            return
        if path != keep:
            total -= _size(path)
            shutil.rmtree(path, ignore_errors=True)


def _size(entry: Path) -> int:
    size = 0
    for file in (entry, *entry.rglob("*")) if entry.is_file() else entry.rglob("*"):
        with suppress(OSError):
            size += file.stat().st_size
    return size

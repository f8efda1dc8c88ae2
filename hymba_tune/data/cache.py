"""The cache of encoded data between runs. Its keys are hashes of the inputs; an entry is complete once it is renamed.

Several processes may use it at a time. An entry that one process removes stays readable for those that have it open.
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
from hymba_tune.files import seal

if TYPE_CHECKING:  # importing transformers imports torch
    from transformers import PreTrainedTokenizerBase

CacheKind = Literal["data", "targets", "answers", "pairs"]
CACHE_KINDS: dict[CacheKind, str] = {
    "data": "encoded data",
    "targets": "teacher targets",
    "answers": "teacher generations",
    "pairs": "tables of tokenizer pairs",
}
"""The kinds of content in the user's cache, with descriptions."""
LIMIT_BYTES = 20 * 2**30
"""Maximum bytes of encoded data; the least recently used entries are removed first."""
STALE_SECONDS = 2 * 24 * 3600
"""Age from which an unfinished entry counts as abandoned."""
UNFINISHED = "unfinished-"


def cache_folder(kind: CacheKind = "data") -> Path:
    """Return the cache folder of a kind: ``hymba-tune/KIND`` in ``XDG_CACHE_HOME`` or ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "hymba-tune", kind)


def entry_key(sources: Sequence[Source], tokenizer: PreTrainedTokenizerBase, **settings: Any) -> str | None:
    """Hash everything that affects the encoded rows, this code included.

    Args:
        sources: The sources; their contents and names are hashed, since reports and rows hold the names.
        tokenizer: The tokenizer; its vocabulary and template are hashed.
        settings: All other settings that affect the rows; must be serializable as JSON.

    Returns:
        64 hexadecimal digits; `None` if a source has no digest of its content.
    """
    contents = [source.content() if source.content else None for source in sources]
    if None in contents:
        return None

    # Versions of the tokenizers library may tokenize differently, and so may an edited copy of this package.
    parts = {
        "sources": [
            [source.name, content, source.weight, source.max_rows, dict(source.mapping), source.escape]
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
    """Return the folder, created if necessary; a temporary folder if it is `None` or not writable.

    A temporary folder is removed when Python ends.
    """
    if folder is not None:
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
            return folder
    folder = Path(tempfile.mkdtemp(prefix="hymba-tune-data-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def unfinished(folder: Path) -> tempfile.TemporaryDirectory[str]:
    """Create a folder for an entry that is being written."""
    return tempfile.TemporaryDirectory(dir=folder, prefix=UNFINISHED)


def store(finished: Path, folder: Path, name: str) -> Path:
    """Seal a finished entry, and move it to its name. If another process stored it first, that entry is used."""
    entry = folder / name
    seal(finished)
    try:
        # A rename is atomic, so no process ever sees half an entry under its name.
        finished.rename(entry)
    except OSError:
        if not entry.is_dir():
            raise
    _evict(folder, current=entry)
    return entry


def touch(entry: Path) -> None:
    """Mark an entry as used now."""
    # The modification time of the folder records the last use: access times are often not updated.
    with suppress(OSError):
        os.utime(entry)


def clear(folder: Path) -> tuple[int, int]:
    """Remove every entry.

    Returns:
        The number of entries and their bytes.
    """
    entries = list(folder.iterdir()) if folder.is_dir() else []
    size = sum(map(_size, entries))
    for entry in entries:
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
    return sum(not entry.name.startswith(UNFINISHED) for entry in entries), size


def _evict(folder: Path, current: Path) -> None:
    """Remove abandoned entries, then the least recently used ones above the limit, but never ``current``."""
    entries = []
    for path in folder.iterdir():
        with suppress(OSError):  # another process removed it
            used = path.stat().st_mtime
            if not path.name.startswith(UNFINISHED):
                entries.append((used, path))
            # A young one may still be written by another process.
            elif used < time.time() - STALE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)

    total = sum(_size(path) for _, path in entries)
    for _, path in sorted(entries):
        if total <= LIMIT_BYTES:
            return
        if path != current:
            total -= _size(path)
            shutil.rmtree(path, ignore_errors=True)


def _size(entry: Path) -> int:
    size = 0
    for file in (entry, *entry.rglob("*")) if entry.is_file() else entry.rglob("*"):
        with suppress(OSError):
            size += file.stat().st_size
    return size

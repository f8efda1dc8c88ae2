"""The sources that ``--data`` can name: files, datasets of the Hugging Face Hub, and the packaged demo."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from itertools import islice
from pathlib import Path

import datasets

from hymba_tune.data.readers import KINDS, kind, read_file, unreadable
from hymba_tune.data.rows import RowLocation, SourceRow, listing
from hymba_tune.errors import DataError, HubError, nearest

DEMO = "demo"
HUB_NAME = re.compile(r"(?P<path>[\w.-]+/[\w.-]+)(:(?P<config>[^@]+))?(@(?P<split>.+))?")
NAMEABLE = f"{listing(KINDS)} (also with .gz), a mix (.yaml), owner/name on the Hub, or {DEMO}"


@dataclass(frozen=True)
class Source:
    """A stream of rows that can be read any number of times.

    Attributes:
        name: Name of the source as the user gave it.
        read: Starts a new pass over the rows.
        held_out: Evaluation data that comes with the source, if any.
        content: Computes a digest of the content, if that is faster than reading the rows.
        weight: Sampling weight: below 1, the share of the rows; above 1, how often each row is repeated.
        max_rows: Maximum number of rows.
        mapping: The source's own column and role names, in the form of ``--map``.
        escape: Whether special tokens inside its texts are written as plain text.
        download: Downloads the rows if they are not on this machine; reading them also does so.
    """

    name: str
    read: Callable[[], Iterator[SourceRow]]
    held_out: Source | None = None
    content: Callable[[], str] | None = None
    weight: float = 1.0
    max_rows: int | None = None
    mapping: Mapping[str, str] = field(default_factory=dict)
    escape: bool = False
    download: Callable[[], object] = lambda: None

    def __iter__(self) -> Iterator[SourceRow]:
        """Iterate over the rows.

        Raises:
            DataError: If the source cannot be read, or has no rows.
            HubError: If the Hub cannot be reached or has no such dataset.
        """
        empty = True
        for row in islice(self.read(), self.max_rows):
            empty = False
            yield row
        if empty:
            raise DataError(f"Cannot use {self.name}: it has no rows.", expected="at least one")


def open_source(name: str) -> Source:
    """Open the source with a name that a user gave, without reading its rows.

    Args:
        name: A file, ``demo``, or ``owner/name`` on the Hub; in full ``owner/name:config@split``, with ``train`` as the
            default split.

    Returns:
        The source. A Hub dataset is downloaded when it is first read.

    Raises:
        DataError: If there is no such file, or its type is unknown.
    """
    if name == DEMO:
        return replace(_demo("train", DEMO), held_out=_demo("eval", f"{DEMO} (eval)"))
    path = Path(name).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if kind(file) in KINDS)
        fix = f"name its files: {listing(files[:3])}" if files else ""
        raise DataError(f"Cannot use {name}: it is a folder.", expected=NAMEABLE, fix=fix)
    if path.exists():
        if not path.is_file():
            raise DataError(f"Cannot use {name}: it is a pipe or a device.", expected=NAMEABLE, fix="save it as a file")
        if kind(path) not in KINDS:
            raise DataError(f"Cannot use {name}: its ending is unknown.", expected=NAMEABLE)
        return Source(name, lambda: read_file(path, name), content=lambda: digest(path, name))
    hub = HUB_NAME.fullmatch(name)
    if hub and kind(path) not in KINDS and not path.parent.is_dir():
        return _open_hub(name, hub["path"], hub["config"], hub["split"] or "train")
    raise DataError(f"Cannot find {name}.", expected=NAMEABLE, fix=_near_names(path))


def _demo(split: str, name: str) -> Source:
    path = Path(str(resources.files("hymba_tune.assets") / DEMO / f"{split}.jsonl"))
    return Source(name, lambda: read_file(path, f"{DEMO} ({split})"), content=lambda: digest(path, name))


def digest(path: Path, name: str) -> str:
    """Return the SHA-256 of a file with the ending that decides how it is read.

    Raises:
        DataError: If the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() + kind(path)
    except OSError as error:
        raise unreadable(name, error) from error


def _near_names(path: Path) -> str:
    if not path.parent.is_dir():
        return f"there is no folder {path.parent} either"
    near = nearest(path.name, (file.name for file in path.parent.iterdir()))
    return f"did you mean {path.parent / near}?" if near else ""


def _open_hub(name: str, path: str, config: str | None, split: str) -> Source:
    @cache
    def rows() -> datasets.Dataset:
        return _load_hub(name, path, config, split)

    def read() -> Iterator[SourceRow]:
        for number, value in enumerate(rows(), start=1):
            yield SourceRow(RowLocation(name, number, "row"), value)

    return Source(name, read, content=lambda: f"{name} {rows()._fingerprint}", download=rows)


def _load_hub(name: str, path: str, config: str | None, split: str) -> datasets.Dataset:
    try:
        return datasets.load_dataset(path, config, split=split)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise HubError(
            f"Cannot use {name}: there is no such file, and {error}",
            fix="correct the name; for a private or gated dataset, log in: hf auth login",
        ) from error
    except ConnectionError as error:
        raise HubError(
            f"Cannot load {name}: the Hugging Face Hub cannot be reached, and there is no such file.",
            expected="a connection, or the dataset in the local cache",
            fix="--data FILE, or --data demo to try the kit",
        ) from error
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"Cannot load {name}: {str(error).strip()}",
            fix=f"choose what to load: {path}:CONFIG, {path}@SPLIT or {path}:CONFIG@SPLIT",
        ) from error

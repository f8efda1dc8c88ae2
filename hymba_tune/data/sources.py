"""The sources that ``--data`` can name: files, datasets of the Hugging Face Hub, and the packaged demo."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from hymba_tune.data.readers import BATCH_ROWS, KINDS, kind, read_arrow, read_file, unreadable
from hymba_tune.data.rows import ColumnChoice, SourceRow, listing
from hymba_tune.errors import DataError, HubError, nearest, shortened

if TYPE_CHECKING:
    import datasets

DEMO = "demo"
HUB_NAME = re.compile(r"(?P<path>[\w.-]+/[\w.-]+)(:(?P<config>[^@]+))?(@(?P<split>.+))?")
TRAIN = "train"
EVALUATION = ("validation", "valid", "val", "eval", "evaluation", "dev", "test")
"""Names of splits to evaluate on, the most fitting first."""
SPLIT_NAME = re.compile(rf"({'|'.join([TRAIN, *EVALUATION])})(?P<shard>-\d+-of-\d+)?\.")
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
        read_columns: Starts a pass that reads only some columns, if the source can.
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
    read_columns: Callable[[ColumnChoice], Iterator[SourceRow]] | None = None
    download: Callable[[], object] = lambda: None

    def only(self, choose: ColumnChoice) -> Source:
        """Return the source with only the columns that are needed read, if it can read some without the others."""
        read = self.read_columns
        return self if read is None else replace(self, read=lambda: read(choose))

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
        return open_folder(path, name)
    if path.exists():
        if not path.is_file():
            raise DataError(f"Cannot use {name}: it is a pipe or a device.", expected=NAMEABLE, fix="save it as a file")
        if kind(path) not in KINDS:
            raise DataError(f"Cannot use {name}: its ending is unknown.", expected=NAMEABLE)
        return _file_source(path, name)
    if path.is_symlink():
        raise DataError(
            f"Cannot find {name}: it is a link to {path.readlink()}, which is not there.", expected=NAMEABLE
        )
    hub = HUB_NAME.fullmatch(name)
    if hub and kind(path) not in KINDS and not path.parent.is_dir():
        return _open_hub(name, hub["path"], hub["config"], hub["split"] or "train")
    raise DataError(f"Cannot find {shortened(name)}.", expected=NAMEABLE, fix=_near_names(path))


def _demo(split: str, name: str) -> Source:
    path = Path(str(resources.files("hymba_tune.assets") / DEMO / f"{split}.jsonl"))
    return Source(name, lambda: read_file(path, f"{DEMO} ({split})"), content=lambda: digest(path, name))


def open_folder(path: Path, name: str) -> Source:
    """Open a folder that `datasets` saved, or one with files for training, and for evaluation if it has such.

    Raises:
        DataError: If it is another folder.
    """
    if (path / "dataset_dict.json").is_file():
        splits = {part.name: _saved_dataset(part, f"{name} ({part.name})") for part in path.iterdir() if part.is_dir()}
    elif (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        splits = {TRAIN: _saved_dataset(path, name)}
    else:
        splits = {}
        for split, files in _split_files(path).items():
            splits[split] = _joined([_file_source(file, str(file)) for file in files], f"{name} ({split})")
    if TRAIN not in splits:
        known = sorted(str(file) for file in path.iterdir() if kind(file) in KINDS)
        raise DataError(
            f"Cannot use {name}: it is a folder, and not clear which of its files is for training.",
            expected="train.jsonl (or .parquet, .csv, …), with eval.jsonl, or a dataset that save_to_disk wrote",
            fix=f"name its files: {listing(known[:3])}" if known else "",
        )
    held_out = next((splits[split] for split in EVALUATION if split in splits), None)
    return replace(splits[TRAIN], held_out=held_out)


def _split_files(folder: Path) -> dict[str, list[Path]]:
    """Return the data files of a folder, or of its subfolder ``data``, by the split that they are named after.

    A split has several files only if they are numbered: ``train-00000-of-00002.parquet``.
    """
    splits: dict[str, list[Path]] = {}
    whole: set[str] = set()
    for file in sorted([*folder.iterdir(), *(folder / "data").glob("*")]):
        name = SPLIT_NAME.match(file.name.lower())
        if name and file.is_file() and kind(file) in KINDS:
            splits.setdefault(name[1], []).append(file)
            whole |= set() if name["shard"] else {name[1]}
    return {split: files for split, files in splits.items() if len(files) == 1 or split not in whole}


def _joined(sources: Sequence[Source], name: str) -> Source:
    """Return the rows of several files as one source."""
    if len(sources) == 1:
        return sources[0]
    return Source(
        name,
        lambda: chain.from_iterable(sources),
        content=lambda: " ".join(source.content() for source in sources if source.content),
        read_columns=lambda choose: chain.from_iterable(source.only(choose) for source in sources),
    )


def _file_source(path: Path, name: str) -> Source:
    return Source(
        name,
        lambda: read_file(path, name),
        content=lambda: digest(path, name),
        read_columns=lambda choose: read_file(path, name, choose),
    )


def _saved_dataset(path: Path, name: str) -> Source:
    @cache
    def rows() -> datasets.Dataset:
        import datasets  # takes a second, which few sources need

        try:
            return datasets.load_from_disk(str(path))
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            raise unreadable(name, error) from error

    return _dataset_source(name, rows)


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
        return f"there is no folder {shortened(str(path.parent))} either"
    near = nearest(path.name, (file.name for file in path.parent.iterdir()))
    return f"did you mean {path.parent / near}?" if near else ""


def _open_hub(name: str, path: str, config: str | None, split: str) -> Source:
    @cache
    def rows() -> datasets.Dataset:
        return _load_hub(name, path, config, split)

    return replace(_dataset_source(name, rows), download=rows)


def _dataset_source(name: str, rows: Callable[[], datasets.Dataset]) -> Source:
    def read(choose: ColumnChoice | None = None) -> Iterator[SourceRow]:
        # As Arrow: decoding would open images, and fail at cells that are not needed.
        table = rows().with_format("arrow")
        columns = table.column_names
        if choose is not None:
            table = table.select_columns([column for column in columns if column in choose(columns)])
        return read_arrow(table.iter(BATCH_ROWS), columns, name)

    return Source(name, read, content=lambda: f"{name} {rows()._fingerprint}", read_columns=read)


def _load_hub(name: str, path: str, config: str | None, split: str) -> datasets.Dataset:
    import datasets

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

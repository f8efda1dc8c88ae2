"""From sources to rows of token ids on disk, and the account of what became of every row on the way."""

from __future__ import annotations

import atexit
import hashlib
import json
import random
import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import pyarrow as pa
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from hymba_tune.config import OnBadRow
from hymba_tune.data.chat import IGNORED, Encoded, Rendered, fit, render, tokenize
from hymba_tune.data.formats import Conversation, Example, Names, parse
from hymba_tune.data.rows import Place, Row, RowError, listing
from hymba_tune.data.sources import Source
from hymba_tune.errors import DataError

BATCH_ROWS = 256
LOOK_AHEAD = 10_000  # rows, a second or two, to say whether a bad row is the only one
BATCH_CHARS = 2**20  # what bounds memory where rows are megabytes long
SCHEMA = pa.schema({"input_ids": pa.list_(pa.int32()), "labels": pa.list_(pa.int32()), "place": pa.string()})


@dataclass(frozen=True, slots=True)
class Dropped:
    """A row that is not trained on. ``reason`` is ``bad row`` or ``too long``; ``what`` says it in full."""

    place: Place
    reason: str
    what: str


@dataclass
class DataReport:
    """What became of the rows.

    Attributes:
        rows: Rows read.
        conversations: Conversations kept.
        texts: Plain texts kept.
        cut: Rows longer than the maximum length: conversations that lost their end, texts that go on in further rows.
        tokens: Tokens kept.
        learned: Those of them that carry loss.
        longest: Tokens of the longest row kept.
        dropped: Rows left out, in order.
        fingerprint: SHA-256 over the token ids and labels of all rows in order: the same for the same training data,
            whatever files and formats it came from.
    """

    rows: int = 0
    conversations: int = 0
    texts: int = 0
    cut: int = 0
    tokens: int = 0
    learned: int = 0
    longest: int = 0
    dropped: list[Dropped] = field(default_factory=list)
    fingerprint: str = ""

    @property
    def too_long(self) -> int:
        """Rows dropped because their answers begin past the maximum length."""
        return sum(dropped.reason == "too long" for dropped in self.dropped)

    @property
    def bad_rows(self) -> int:
        """Rows dropped because they cannot be used."""
        return len(self.dropped) - self.too_long

    def counts(self) -> dict[str, int | str]:
        """The report without the list of dropped rows, for ``run.json``."""
        sizes = ("rows", "conversations", "texts", "cut", "tokens", "learned", "longest", "too_long", "bad_rows")
        return {name: getattr(self, name) for name in (*sizes, "fingerprint")}

    def write_dropped(self, path: Path) -> None:
        """Write the dropped rows as JSON lines of ``file``, ``line`` (or ``row``), ``reason`` and ``what``."""
        with path.open("w", encoding="utf-8") as file:
            for row in self.dropped:
                where = {"file": row.place.file, row.place.unit: row.place.number}
                file.write(json.dumps({**where, "reason": row.reason, "what": row.what}, ensure_ascii=False) + "\n")


def build_dataset(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    mapping: Mapping[str, str] | None = None,
    on_bad_row: OnBadRow = OnBadRow.stop,
    cache_dir: Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[Dataset, DataReport]:
    """Encode all rows of the sources, a batch in memory at a time.

    Args:
        sources: Read one after the other.
        tokenizer: With a chat template, if there are conversations.
        max_length: Tokens a row may have.
        mapping: ``--map``: see `Names.parse`.
        on_bad_row: Whether the first row that cannot be used stops everything, or is listed in the report.
        cache_dir: Where the encoded rows are kept, under a name made of their fingerprint. A folder that is removed
            when Python ends, if not given.
        progress: Called with the number of rows read so far, after every batch.

    Returns:
        The rows, memory-mapped, with int32 lists ``input_ids`` and ``labels`` as in `Encoded`, and the ``place`` they
        were read from, in the order of the sources; and the report on them.

    Raises:
        RowError: At the first row that cannot be used, if ``on_bad_row`` is ``stop``.
        DataError: If a source cannot be read or no row can be used.
        ConfigError: If ``mapping`` names a field or role that does not exist.
    """
    report, digest = DataReport(), hashlib.sha256()
    folder = cache_dir or _temporary_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as unfinished:
        part = Path(unfinished) / "rows.arrow"
        rows = _rendered_rows(sources, tokenizer, Names.parse(mapping or {}), on_bad_row, report)
        with pa.OSFile(str(part), "wb") as file, pa.ipc.new_stream(file, SCHEMA) as writer:
            for batch in _batches(rows):
                kept = _encode_batch(batch, tokenizer, max_length, report)
                for _, row in kept:
                    digest.update(array("i", [len(row.input_ids), *row.input_ids, *row.labels]).tobytes())
                columns = {
                    "input_ids": [row.input_ids for _, row in kept],
                    "labels": [row.labels for _, row in kept],
                    "place": [str(place) for place, _ in kept],
                }
                writer.write_batch(pa.RecordBatch.from_pydict(columns, SCHEMA))
                if progress:
                    progress(report.rows)
        if not report.learned:
            raise _nothing_learned(report, sources)
        report.fingerprint = digest.hexdigest()
        path = part.replace(folder / f"{report.fingerprint}.arrow")
    return Dataset.from_file(str(path)), report


def _temporary_folder() -> Path:
    folder = tempfile.mkdtemp(prefix="hymba-tune-data-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _rendered_rows(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    names: Names,
    on_bad_row: OnBadRow,
    report: DataReport,
) -> Iterator[tuple[Place, Rendered]]:
    for source in sources:
        rows = iter(source)
        for row in rows:
            report.rows += 1
            rendered = _attempt(row, names, tokenizer)
            if isinstance(rendered, Rendered):
                yield row.place, rendered
            elif on_bad_row is OnBadRow.skip:
                report.dropped.append(Dropped(row.place, "bad row", rendered.what))
            else:
                ahead = (_attempt(other, names, tokenizer) for other in islice(rows, LOOK_AHEAD))
                bad = [isinstance(other, DataError) for other in ahead]
                raise RowError(row.place, rendered, extent=_extent(bad))


def _attempt(row: Row, names: Names, tokenizer: PreTrainedTokenizerBase) -> Rendered | DataError:
    try:
        return render(_example(row, names), tokenizer)
    except DataError as problem:
        return problem


def _example(row: Row, names: Names) -> Example:
    if row.error:
        raise row.error
    return parse(row.value, names)


def _extent(bad: list[bool]) -> str:
    """How many bad rows there are, from the first one on and as far as was looked ahead."""
    count = f"{1 + sum(bad)} such rows" if any(bad) else "the only one"
    return f"{count} in the file" if len(bad) < LOOK_AHEAD else f"{count} among {LOOK_AHEAD:,} rows"


def _batches(rows: Iterator[tuple[Place, Rendered]]) -> Iterator[list[tuple[Place, Rendered]]]:
    batch: list[tuple[Place, Rendered]] = []
    chars = 0
    for place, rendered in rows:
        batch.append((place, rendered))
        chars += len(rendered.text)
        if len(batch) == BATCH_ROWS or chars > BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _encode_batch(
    batch: list[tuple[Place, Rendered]], tokenizer: PreTrainedTokenizerBase, max_length: int, report: DataReport
) -> list[tuple[Place, Encoded]]:
    kept: list[tuple[Place, Encoded]] = []
    for (place, rendered), whole in zip(batch, tokenize([rendered for _, rendered in batch], tokenizer), strict=True):
        size = len(whole.input_ids)
        rows = fit(whole, max_length, split=rendered.plain)
        if not rows:
            first = next(index for index, label in enumerate(whole.labels) if label != IGNORED)
            what = f"its first answer begins at token {first + 1:,} of {size:,}, past --max-length {max_length:,}"
            report.dropped.append(Dropped(place, "too long", what))
            continue
        report.cut += size > max_length
        report.texts += rendered.plain
        report.conversations += not rendered.plain
        report.tokens += sum(len(row.input_ids) for row in rows)
        report.learned += sum(row.learned for row in rows)
        report.longest = max(report.longest, *(len(row.input_ids) for row in rows))
        kept += [(place, row) for row in rows]
    return kept


def _nothing_learned(report: DataReport, sources: Sequence[Source]) -> DataError:
    first = report.dropped[0]
    return DataError(
        f"Nothing to learn in {listing(source.name for source in sources)}: of {report.rows:,} rows, "
        f"{report.too_long:,} are too long and {report.bad_rows:,} bad. The first, {first.place}: {first.what}.",
        expected="at least one row with an answer that begins within --max-length",
        fix="a larger --max-length" if report.too_long else "mend the rows, or name their columns with --map",
    )


def split_dataset(
    dataset: Dataset, fraction: float, *, seed: int, max_rows: int | None = None
) -> tuple[Dataset, Dataset | None]:
    """Hold out a share of the rows, drawn at random; both parts keep their order.

    Args:
        dataset: As `build_dataset` gives it.
        fraction: Share of the rows to hold out, in ``[0, 1)``; 0 holds out nothing.
        seed: The same seed draws the same rows.
        max_rows: The most rows to hold out; what exceeds it stays in the first part.

    Returns:
        The rows to train on, and the held-out ones, at least one, or `None` if ``fraction`` is 0.

    Raises:
        DataError: If there are fewer than two rows to part.
    """
    if fraction == 0:
        return dataset, None
    rows = len(dataset)
    if rows < 2:
        raise DataError(
            f"Cannot hold out evaluation data: there is only {rows} row.",
            expected="at least 2 rows",
            fix="--eval-data FILE, or --eval-split 0 to do without",
        )
    count = min(max(1, round(rows * fraction)), rows - 1, max_rows or rows)
    held_out = set(random.Random(seed).sample(range(rows), count))
    return (
        dataset.select([row for row in range(rows) if row not in held_out]),
        dataset.select(sorted(held_out)),
    )


def sample_prompts(
    sources: Sequence[Source], count: int, mapping: Mapping[str, str] | None = None
) -> list[tuple[Conversation, str]]:
    """The first conversations of the sources, each as what comes before its last answer, and that answer.

    Args:
        sources: Read only as far as needed; bad rows and plain texts are passed over.
        count: The most conversations to return.
        mapping: As for `build_dataset`.
    """
    names = Names.parse(mapping or {})
    samples = (_before_last_answer(talk) for source in sources for talk in _conversations(source, names))
    return list(islice(samples, count))


def _conversations(source: Source, names: Names) -> Iterator[Conversation]:
    for row in source:
        with suppress(DataError):
            example = _example(row, names)
            if isinstance(example, Conversation):
                yield example


def _before_last_answer(conversation: Conversation) -> tuple[Conversation, str]:
    messages = conversation.messages
    last = max(index for index, message in enumerate(messages) if message.role == "assistant")
    return replace(conversation, messages=messages[:last]), messages[last].content

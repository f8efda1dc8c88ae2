"""The report on encoded and dropped rows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self, TextIO

from hymba_tune.data.rows import RowLocation
from hymba_tune.errors import DataError


@dataclass(frozen=True, slots=True)
class Dropped:
    """A row that is not trained on.

    Attributes:
        place: Where the row was read.
        reason: Either ``bad row`` or ``too long``.
        what: The reason in detail.
        fix: What to do about it; may be empty.
    """

    place: RowLocation
    reason: str
    what: str
    fix: str = ""

    def as_row(self) -> dict[str, str | int]:
        """Return the dropped row as values for JSON."""
        where: dict[str, str | int] = {"file": self.place.file, self.place.unit: self.place.number}
        return {**where, "reason": self.reason, "what": self.what}


@dataclass
class SourceCounts:
    """Row counts of one source.

    Attributes:
        name: Name of the source as the user gave it.
        weight: Sampling weight of its rows.
        rows: Rows read; with a weight below 1, rows that were drawn.
        kept: Encoded rows, which lie one after the other; a long text gives several.
    """

    name: str
    weight: float = 1.0
    rows: int = 0
    kept: int = 0

    def share(self) -> str:
        """Describe the number of rows that are trained on."""
        if self.weight == 1:
            return f"{self.kept:,} rows"
        if self.weight < 1:
            return f"{self.kept:,} rows (× {self.weight:g})"
        return f"{self.kept * self.weight:,.0f} rows ({self.kept:,} × {self.weight:g})"


def short_names(sources: Sequence[SourceCounts]) -> list[str]:
    """Return short names of the sources, no two the same."""
    for names in ([Path(source.name).name for source in sources], [source.name for source in sources]):
        if len(set(names)) == len(names):
            return names
    return [f"{source.name} ({number})" for number, source in enumerate(sources, start=1)]


@dataclass
class DataReport:
    """The report on the rows of some sources.

    Attributes:
        rows: Rows read.
        conversations: Encoded conversations.
        texts: Encoded plain texts.
        cut: Conversations longer than the maximum length, which lost their end. Texts continue in further rows.
        tokens: Encoded tokens.
        learned: Encoded tokens with loss.
        longest: Tokens of the longest encoded row.
        weighted: Encoded rows with loss weights.
        special: Rows with special tokens inside their texts, which the model reads as the real ones.
        too_long: Rows dropped because their answers begin past the maximum length.
        bad_rows: Rows dropped because they cannot be used.
        first_dropped: The first dropped row.
        dropped_file: File that lists all dropped rows, one per line, so that memory does not grow with them.
        sources: Counts by source.
        fingerprint: SHA-256 over the token ids and labels of all rows in order, and the weights above 1. It is the same
            for the same training data in any files and formats.
    """

    rows: int = 0
    conversations: int = 0
    texts: int = 0
    cut: int = 0
    tokens: int = 0
    learned: int = 0
    longest: int = 0
    weighted: int = 0
    special: int = 0
    too_long: int = 0
    bad_rows: int = 0
    first_dropped: Dropped | None = None
    dropped_file: Path | None = field(default=None, compare=False)
    sources: list[SourceCounts] = field(default_factory=list)
    fingerprint: str = ""

    def drop_bad(self, place: RowLocation, problem: DataError, listing: TextIO) -> None:
        """Count a row that cannot be used, and list it."""
        self.bad_rows += 1
        self._drop(Dropped(place, "bad row", problem.what, problem.details["to fix"]), listing)

    def drop_long(self, place: RowLocation, what: str, listing: TextIO) -> None:
        """Count a row whose answers begin past the maximum length, and list it."""
        self.too_long += 1
        self._drop(Dropped(place, "too long", what), listing)

    def _drop(self, dropped: Dropped, listing: TextIO) -> None:
        self.first_dropped = self.first_dropped or dropped
        listing.write(json.dumps(dropped.as_row(), ensure_ascii=False) + "\n")

    def shares(self) -> str:
        """Describe the number of rows of each source; empty for a single source without a weight."""
        if len(self.sources) == 1 and self.sources[0].weight == 1:
            return ""
        named = zip(short_names(self.sources), self.sources, strict=True)
        return " · ".join(f"{name} {source.share()}" for name, source in named)

    def counts(self) -> dict[str, Any]:
        """Return the report for ``run.json``, without the list of dropped rows."""
        excluded = ("first_dropped", "dropped_file")
        return {name: value for name, value in asdict(self).items() if name not in excluded}

    def write_dropped(self, path: Path) -> None:
        """Write the dropped rows as JSON lines of ``file``, ``line`` (or ``row``), ``reason`` and ``what``."""
        if self.dropped_file is None:
            path.touch()
        else:
            shutil.copyfile(self.dropped_file, path)

    @classmethod
    def load(cls, path: Path, dropped_file: Path) -> Self:
        """Load a report that `save` wrote."""
        counts = json.loads(path.read_text(encoding="utf-8"))
        counts["sources"] = [SourceCounts(**source) for source in counts["sources"]]
        return cls(**counts, dropped_file=dropped_file)

    def save(self, path: Path) -> None:
        """Write the counts as JSON."""
        path.write_text(json.dumps(self.counts()), encoding="utf-8")

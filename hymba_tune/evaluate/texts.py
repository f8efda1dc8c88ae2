"""The rows that a model is scored on, read as training reads them, one batch in memory at a time."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from transformers import PreTrainedTokenizerBase

from hymba_tune.config import EvalConfig, Learn, OnBadRow, as_mapping
from hymba_tune.data import IGNORED, Encoded, RowError, Source, open_sources
from hymba_tune.data.chat import Rendered, fit
from hymba_tune.data.encoding import encoded_batches, readings
from hymba_tune.data.rows import listing
from hymba_tune.errors import DataError


@dataclass(frozen=True)
class ScoredRow:
    """A row, and the number of UTF-8 bytes that its scored tokens spell; end tokens spell none."""

    encoded: Encoded
    spelled: int


@dataclass
class TextCounts:
    """Counts of the texts to score.

    Attributes:
        rows: Number of rows read.
        bad_rows: Number of those rows that are skipped as bad.
        parts: Number of rows after long texts are split.
        tokens: Number of tokens to score.
        spelled: Number of UTF-8 bytes that these tokens spell.
        fingerprint: SHA-256 of the encoded rows.
    """

    rows: int = 0
    bad_rows: int = 0
    parts: int = 0
    tokens: int = 0
    spelled: int = 0
    fingerprint: str = ""


@dataclass(frozen=True)
class ScoringTexts:
    """Data to score with one tokenizer; every pass reads the sources again."""

    sources: Sequence[Source]
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    mapping: Mapping[str, str] = field(default_factory=dict)
    learn: Learn = Learn.all
    on_bad_row: OnBadRow = OnBadRow.stop

    @classmethod
    def named(cls, config: EvalConfig, tokenizer: PreTrainedTokenizerBase) -> ScoringTexts:
        """Open the sources that ``--data`` names.

        Raises:
            HymbaTuneError: If a source cannot be found.
        """
        sources = open_sources(config.data, escape=config.escape_special_tokens)
        if config.max_rows:
            sources = [replace(source, max_rows=config.max_rows) for source in sources]
        return cls(sources, tokenizer, config.max_length, as_mapping(config.map), config.learn, config.on_bad_row)

    def count(self, progress: Callable[[int], None] = lambda _: None) -> TextCounts:
        """Read everything once, so that errors are reported before the weights load.

        Args:
            progress: Called with the number of rows read.

        Raises:
            RowError: At the first bad row, unless bad rows are skipped.
            DataError: If a source cannot be read, or there is nothing to score.
        """
        counts = TextCounts()
        digest = hashlib.sha256()
        for row in self._rows(counts):
            _add(row, counts, digest)
            progress(counts.rows)
        return self._checked(counts, digest)

    def sample(self, tokens: int) -> tuple[list[ScoredRow], TextCounts]:
        """The first rows of every source, together about ``tokens`` tokens to score; raises what `count` raises."""
        counts = TextCounts()
        digest = hashlib.sha256()
        rows = []
        for number, source in enumerate(self.sources, 1):
            for row in replace(self, sources=[source])._rows(counts):
                _add(row, counts, digest)
                rows.append(row)
                if counts.tokens * len(self.sources) >= tokens * number:
                    break
        return rows, self._checked(counts, digest)

    def _checked(self, counts: TextCounts, digest: hashlib._Hash) -> TextCounts:
        if not counts.tokens:
            raise DataError(
                f"Nothing to score in {listing(source.name for source in self.sources)}: {counts.rows:,} rows, "
                f"{counts.bad_rows:,} of them bad.",
                expected="at least one row with text or an answer that begins within --max-length",
                fix="a larger --max-length, or name the columns with --map",
            )
        counts.fingerprint = digest.hexdigest()
        return counts

    def rows(self) -> Iterator[ScoredRow]:
        """All rows with something to score; raises what `count` raises."""
        return self._rows(TextCounts())

    def _rows(self, counts: TextCounts) -> Iterator[ScoredRow]:
        read = readings(self.sources, self.tokenizer, mapping=self.mapping, learn=self.learn)
        for batch in encoded_batches(read, self.tokenizer):
            for reading in batch:
                counts.rows += 1
                if reading.problem:
                    counts.bad_rows += 1
                    if self.on_bad_row is OnBadRow.stop:
                        raise RowError(reading.row.place, reading.problem, extent="leaves it out")
                elif reading.rendered and reading.encoded:
                    yield from self._fit(reading.encoded[0], reading.rendered[0])

    def _fit(self, encoded: Encoded, rendered: Rendered) -> Iterator[ScoredRow]:
        sizes = spelled_bytes(rendered, encoded, self.tokenizer)
        begin = 0
        for row in fit(encoded, self.max_length, split=rendered.plain):
            end = begin + len(row.input_ids)
            scored = zip(row.labels, sizes[begin:end], strict=True)
            yield ScoredRow(row, sum(size for label, size in scored if label != IGNORED))
            begin = end


def _add(row: ScoredRow, counts: TextCounts, digest: hashlib._Hash) -> None:
    counts.parts += 1
    counts.tokens += row.encoded.learned
    counts.spelled += row.spelled
    digest.update(array("i", [len(row.encoded.labels), *row.encoded.input_ids, *row.encoded.labels]).tobytes())


def spelled_bytes(rendered: Rendered, encoded: Encoded, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The number of UTF-8 bytes that each token spells; a character's bytes count for its first token.

    Args:
        rendered: The text.
        encoded: The text's tokens, of any length; an end token spells nothing.
        tokenizer: The tokenizer that encoded the text.
    """
    offsets = tokenizer(
        rendered.text, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False
    )["offset_mapping"]
    sizes = [0] * (len(encoded.input_ids) - len(offsets))
    reached = 0
    for token, (start, end) in zip(encoded.input_ids[len(sizes) :], offsets, strict=True):
        own = "" if token == tokenizer.eos_token_id else rendered.text[max(start, reached) : end]
        sizes.append(len(own.encode()))
        reached = max(reached, end)
    return sizes

"""Encodes sources of preferences as rows on disk, in the columns of TRL's DPO and KTO trainers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import pyarrow as pa
from datasets import Dataset

from hymba_tune.config import OnBadRow
from hymba_tune.data.building import IDS, RowSchema, build
from hymba_tune.data.comparisons import Comparison, comparisons, fit_answers, read_comparisons
from hymba_tune.data.formats import Conversation, Names
from hymba_tune.data.preferences import FIELDS, IdenticalPairError
from hymba_tune.data.report import DataReport
from hymba_tune.data.rows import RowLocation
from hymba_tune.data.sources import Source
from hymba_tune.errors import DataError

if TYPE_CHECKING:  # importing transformers imports torch
    from transformers import PreTrainedTokenizerBase

PAIRED = {"prompt_ids": IDS, "chosen_ids": IDS, "rejected_ids": IDS}
UNPAIRED = {"prompt_ids": IDS, "completion_ids": IDS, "label": pa.bool_()}


@dataclass
class PreferenceReport(DataReport):
    """The report on rows of preferences.

    Attributes:
        pairs: Encoded pairs.
        good: Encoded answers that are labeled good.
        bad: Encoded answers that are labeled bad.
        ties: Encoded pairs whose row has the same score for both answers.
        identical: Rows dropped because both answers are the same; they also count as bad rows.
        chosen_longer: Encoded pairs whose chosen answer has more tokens.
    """

    pairs: int = 0
    good: int = 0
    bad: int = 0
    ties: int = 0
    identical: int = 0
    chosen_longer: int = 0

    def drop_bad(self, place: RowLocation, problem: DataError, listing: TextIO) -> None:
        """Count a row that cannot be used, and list it."""
        self.identical += isinstance(problem, IdenticalPairError)
        super().drop_bad(place, problem, listing)


def build_preferences(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    *,
    paired: bool,
    max_length: int,
    mapping: Mapping[str, str] | None = None,
    on_bad_row: OnBadRow = OnBadRow.stop,
    seed: int = 0,
    cache_dir: Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[Dataset, PreferenceReport]:
    """Encode all comparisons of the sources, a batch in memory at a time.

    Args:
        sources: The sources, read one after the other.
        tokenizer: A tokenizer with a chat template.
        paired: Whether to read pairs, or single answers with labels; a pair then counts as two of these.
        max_length: Maximum tokens of a prompt with an answer. Longer answers are cut.
        mapping: Column and role names, as for `Names.parse`.
        on_bad_row: Whether the first row that cannot be used raises an error, or is listed in the report.
        seed: Random seed of the rows drawn from sources with a weight below 1.
        cache_dir: Folder of the cache, as for `build_dataset`.
        progress: Called after every batch with the number of rows read so far.

    Returns:
        The rows, memory-mapped, and the report on them. Pairs have int32 lists ``prompt_ids``, ``chosen_ids`` and
        ``rejected_ids``; single answers have ``prompt_ids``, ``completion_ids`` and a ``label``; both have the
        ``place`` they were read from. The tokens are those of the whole conversation, split where the answer begins;
        an answer ends with the end-of-sequence token.

    Raises:
        RowError: At the first row that cannot be used, if ``on_bad_row`` is ``stop``.
        DataError: If a source cannot be read, no row can be used, or the disk is full.
        ConfigError: If ``mapping`` names a field or role that does not exist.
    """
    columns = PAIRED if paired else UNPAIRED
    return build(
        RowSchema(
            columns=columns,
            report=PreferenceReport,
            fit=lambda batch, report: (_fit(comparison, max_length, report) for comparison in batch),
            fingerprinted=lambda row: [number for name in columns for number in _numbers(row[name])],
            purpose=("train on", "whose answers begin"),
        ),
        comparisons(sources, tokenizer, paired=paired, mapping=mapping, seed=seed),
        sources,
        tokenizer,
        {"max_length": max_length, "mapping": dict(mapping or {}), "seed": seed},
        on_bad_row=on_bad_row,
        cache_dir=cache_dir,
        progress=progress,
    )


def _numbers(value: list[int] | int) -> list[int]:
    return [len(value), *value] if isinstance(value, list) else [value]


def _fit(comparison: Comparison, max_length: int, report: PreferenceReport) -> list[dict[str, Any]] | str:
    fitted = fit_answers(comparison.encoded, max_length)
    if fitted.unusable:
        return fitted.unusable

    prompt, answers = fitted.prompt, fitted.answers
    sizes = [len(answer) for answer in answers]
    report.tokens += sum(len(prompt) + size for size in sizes)
    report.learned += sum(sizes)
    report.longest = max(report.longest, len(prompt) + max(sizes))
    report.cut += answers != fitted.uncut

    if len(answers) == 1:
        report.good += comparison.good
        report.bad += not comparison.good
        return [{"prompt_ids": prompt, "completion_ids": answers[0], "label": comparison.good}]
    report.pairs += 1
    report.ties += comparison.tie
    report.chosen_longer += sizes[0] > sizes[1]
    return [{"prompt_ids": prompt, "chosen_ids": answers[0], "rejected_ids": answers[1]}]


def sample_preferred(
    sources: Sequence[Source], count: int, mapping: Mapping[str, str] | None = None, *, paired: bool
) -> list[tuple[Conversation, str]]:
    """Return the first chosen or good answers of the sources, each as the messages before it, and the answer.

    Args:
        sources: The sources, read only as far as necessary. Bad rows are skipped.
        count: Maximum number of conversations.
        mapping: Column and role names, as for `Names.parse`.
        paired: Whether to read pairs, or single answers with labels.
    """
    good = chain.from_iterable(_good(source, mapping or {}, paired=paired) for source in sources)
    return [(replace(one, messages=one.messages[:-1]), one.messages[-1].content) for one in islice(good, count)]


def _good(source: Source, mapping: Mapping[str, str], *, paired: bool) -> Iterator[Conversation]:
    names = Names.parse({**mapping, **source.mapping}, FIELDS)
    for row in source:
        with suppress(DataError):
            for comparison in read_comparisons(row, names, paired=paired):
                if comparison.good:
                    yield comparison.conversations[0]

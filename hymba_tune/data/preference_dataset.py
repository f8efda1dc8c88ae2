"""From sources to rows of compared answers on disk, as TRL's trainers for pairs and for judged answers take them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import pyarrow as pa
from datasets import Dataset

from hymba_tune.config import OnBadRow
from hymba_tune.data.building import IDS, RowSchema, build
from hymba_tune.data.comparisons import Comparison, comparisons, read_comparisons, split_answers
from hymba_tune.data.formats import Conversation, Names
from hymba_tune.data.preferences import FIELDS, IdenticalPairError
from hymba_tune.data.report import DataReport
from hymba_tune.data.rows import RowLocation
from hymba_tune.data.sources import Source
from hymba_tune.errors import DataError

if TYPE_CHECKING:  # importing transformers imports torch
    from transformers import PreTrainedTokenizerBase

PAIRED = {"prompt_ids": IDS, "chosen_ids": IDS, "rejected_ids": IDS}
JUDGED = {"prompt_ids": IDS, "completion_ids": IDS, "label": pa.bool_()}


@dataclass
class PreferenceReport(DataReport):
    """What became of rows of preferences.

    Attributes:
        pairs: Pairs kept.
        good: Answers kept that are judged good.
        bad: Answers kept that are judged bad.
        ties: Pairs kept whose row scores both answers the same.
        identical: Rows dropped because both answers are the same; they count as bad rows as well.
        chosen_longer: Pairs kept whose better answer has more tokens.
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
        sources: Read one after the other.
        tokenizer: With a chat template.
        paired: Whether rows are pairs, or judged answers; for those a pair counts as two.
        max_length: Tokens that a prompt with an answer may have. Longer answers are cut.
        mapping: ``--map``: see `Names.parse`.
        on_bad_row: Whether the first row that cannot be used stops everything, or is listed in the report.
        seed: Of the rows drawn from sources with a weight below 1.
        cache_dir: Where encoded rows are kept and found again, as by `build_dataset`.
        progress: Called with the number of rows read so far, after every batch.

    Returns:
        The rows, memory-mapped: of pairs int32 lists ``prompt_ids``, ``chosen_ids`` and ``rejected_ids``, of judged
        answers ``prompt_ids``, ``completion_ids`` and a ``label``; and the ``place`` they were read from. The tokens
        are those of the whole conversation, split where the answer begins; an answer ends with the end-of-sequence
        token. And the report on them.

    Raises:
        RowError: At the first row that cannot be used, if ``on_bad_row`` is ``stop``.
        DataError: If a source cannot be read, no row can be used, or the disk is full.
        ConfigError: If ``mapping`` names a field or role that does not exist.
    """
    columns = PAIRED if paired else JUDGED
    return build(
        RowSchema(
            columns=columns,
            report=PreferenceReport,
            fit=lambda some, report: (_fit(one, max_length, report) for one in some),
            fingerprinted=lambda row: [number for name in columns for number in _numbers(row[name])],
            purpose=("compare", "whose answers begin"),
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
    prompt, whole = split_answers(comparison.encoded)
    answers = [answer[: max(0, max_length - len(prompt))] for answer in whole]
    if reason := _lost(prompt, whole, answers, max_length):
        return reason
    sizes = [len(answer) for answer in answers]
    report.tokens += sum(len(prompt) + size for size in sizes)
    report.learned += sum(sizes)
    report.longest = max(report.longest, len(prompt) + max(sizes))
    report.cut += answers != whole
    if len(answers) == 1:
        report.good += comparison.good
        report.bad += not comparison.good
        return [{"prompt_ids": prompt, "completion_ids": answers[0], "label": comparison.good}]
    report.pairs += 1
    report.ties += comparison.tie
    report.chosen_longer += sizes[0] > sizes[1]
    return [{"prompt_ids": prompt, "chosen_ids": answers[0], "rejected_ids": answers[1]}]


def _lost(prompt: list[int], whole: list[list[int]], answers: list[list[int]], max_length: int) -> str:
    """Why nothing can be learned of answers that were cut, if so."""
    if not answers[0] or not answers[-1]:
        size = len(prompt) + max(map(len, whole))
        return f"its answer begins at token {len(prompt) + 1:,} of {size:,}, past --max-length {max_length:,}"
    if len(answers) == 2 and answers[0] == answers[1]:
        return f"its answers differ only past --max-length {max_length:,}"
    return ""


def sample_preferred(
    sources: Sequence[Source], count: int, mapping: Mapping[str, str] | None = None, *, paired: bool
) -> list[tuple[Conversation, str]]:
    """The first good or better answers of the sources, each as what comes before it, and that answer.

    Args:
        sources: Read only as far as needed; bad rows are passed over.
        count: The most conversations to return.
        mapping: As for `build_preferences`.
        paired: As for `build_preferences`.
    """
    found = (talk for source in sources for talk in _good(source, mapping or {}, paired=paired))
    samples = ((replace(talk, messages=talk.messages[:-1]), talk.messages[-1].content) for talk in found)
    return list(islice(samples, count))


def _good(source: Source, mapping: Mapping[str, str], *, paired: bool) -> Iterator[Conversation]:
    names = Names.parse({**mapping, **source.mapping}, FIELDS)
    for row in source:
        with suppress(DataError):
            for one in read_comparisons(row, names, paired=paired):
                if one.good:
                    yield one.talks[0]

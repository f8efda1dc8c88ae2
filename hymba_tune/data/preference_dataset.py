"""From sources to rows of compared answers on disk, as TRL's trainers for pairs and for judged answers take them."""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain, islice, takewhile
from typing import Any, TextIO

import pyarrow as pa
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from hymba_tune.config import DataOptions, Learn, OnBadRow, as_mapping
from hymba_tune.data import cache
from hymba_tune.data.chat import IGNORED, Encoded, Rendered, render, tokenize
from hymba_tune.data.dataset import LOOK_AHEAD, extent_of, nothing_left
from hymba_tune.data.encoding import BATCH_ROWS, drawn
from hymba_tune.data.formats import Conversation, Names
from hymba_tune.data.mixes import open_sources
from hymba_tune.data.preferences import FIELDS, IdenticalPairError, parse_judged, parse_pair
from hymba_tune.data.report import DataReport, Dropped, SourceCounts
from hymba_tune.data.rows import Row, RowError
from hymba_tune.data.sources import Source
from hymba_tune.data.splitting import split_dataset
from hymba_tune.data.training import TrainingData, Working
from hymba_tune.errors import DataError

IDS = pa.list_(pa.int32())
PAIRED = pa.schema({"prompt_ids": IDS, "chosen_ids": IDS, "rejected_ids": IDS, "place": pa.string()})
JUDGED = pa.schema({"prompt_ids": IDS, "completion_ids": IDS, "label": pa.bool_(), "place": pa.string()})


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


@dataclass(slots=True)
class _Comparison:
    """Answers to one prompt, the better one first; or a single one, judged."""

    source: int
    row: Row
    rendered: tuple[Rendered, ...] = ()
    good: bool = True
    tie: bool = False
    problem: DataError | None = None


def read_preferences(
    options: DataOptions,
    tokenizer: PreTrainedTokenizerBase,
    *,
    paired: bool,
    seed: int,
    prompts: int,
    working: Working,
) -> tuple[TrainingData, PreferenceReport]:
    """Read everything that ``--data`` and ``--eval-data`` name as preferences.

    Args:
        options: Which data, and how its rows are read.
        tokenizer: With the chat template that is asked for.
        paired: Whether pairs are wanted, or judged answers.
        seed: Of the rows that are drawn and held out, and of the order of judged answers.
        prompts: How many prompts to return: of the evaluation data, or else of the data.
        working: Told what is done.

    Raises:
        DataError: If data cannot be used; see `build_preferences`.
        ConfigError: If weights, caps or names do not fit the data.
    """
    mapping = as_mapping(options.map)

    def encode(sources: list[Source], label: str) -> tuple[Dataset, PreferenceReport]:
        with working(label) as progress:
            return build_preferences(
                sources,
                tokenizer,
                paired=paired,
                max_length=options.max_length,
                mapping=mapping,
                on_bad_row=options.on_bad_row,
                seed=seed,
                progress=progress,
            )

    sources = open_sources(options.data, options.weights, options.caps)
    # Some sources come with held-out data of their own.
    given = open_sources(options.eval_data) or [source.held_out for source in sources if source.held_out]
    encoded, report = encode(sources, "reading the data")
    train, held_out = split_dataset(
        encoded, 0 if given else options.eval_split, seed=seed, max_rows=options.eval_max_rows, sources=report.sources
    )
    if given:
        held_out, _ = encode(given, "reading the evaluation data")
        held_out = held_out.select(range(min(len(held_out), options.eval_max_rows)))
    if not paired:
        # Judged answers are taken in this order, and a batch should hold good and bad ones to different prompts. Not
        # before the split, which tells sources, and so their weights, by where their rows stand.
        train, held_out = (part and part.shuffle(seed=seed) for part in (train, held_out))
    samples = islice(_samples(given or sources, mapping, paired), prompts)
    return TrainingData(train, held_out, report, list(samples)), report


def build_preferences(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    *,
    paired: bool,
    max_length: int,
    mapping: Mapping[str, str] | None = None,
    on_bad_row: OnBadRow = OnBadRow.stop,
    seed: int = 0,
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
        progress: Called with the number of rows read so far, after every batch.

    Returns:
        The rows, memory-mapped: of pairs int32 lists ``prompt_ids``, ``chosen_ids`` and ``rejected_ids``, of judged
        answers ``prompt_ids``, ``completion_ids`` and a ``label``; and the ``place`` they were read from. The tokens
        are those of the whole conversation, split where the answer begins; an answer ends with the end-of-sequence
        token. And the report on them.

    Raises:
        RowError: At the first row that cannot be used, if ``on_bad_row`` is ``stop``.
        DataError: If a source cannot be read or no row can be used.
        ConfigError: If ``mapping`` names a field or role that does not exist.
    """
    report, digest = PreferenceReport(sources=[SourceCounts(s.name, s.weight) for s in sources]), hashlib.sha256()
    schema, folder = PAIRED if paired else JUDGED, cache.writable(None)
    rows = _comparisons(sources, tokenizer, mapping or {}, paired, seed)
    listed, path = folder / f"dropped-{os.urandom(4).hex()}.jsonl", folder / f"rows-{os.urandom(4).hex()}.arrow"
    with (
        listed.open("w", encoding="utf-8") as dropped,
        pa.OSFile(str(path), "wb") as file,
        pa.ipc.new_stream(file, schema) as writer,
    ):
        for batch in _batches(rows):
            for number, comparison in enumerate(batch):
                if comparison.problem and on_bad_row is OnBadRow.stop:
                    raise _stopped(comparison, chain(batch[number + 1 :], rows))
            kept = _encode(batch, tokenizer, max_length, report, dropped)
            for row in kept:
                for column in schema.names[:-1]:
                    value = row[column]
                    digest.update(array("i", [len(value), *value] if isinstance(value, list) else [value]).tobytes())
            columns = {name: [row[name] for row in kept] for name in schema.names}
            writer.write_batch(pa.RecordBatch.from_pydict(columns, schema))
            if progress:
                progress(report.rows)
    if not report.learned:
        raise nothing_left(report, "compare", "whose answers begin")
    report.fingerprint, report.dropped_file = digest.hexdigest(), listed
    return Dataset.from_file(str(path)), report


def _comparisons(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    mapping: Mapping[str, str],
    paired: bool,
    seed: int,
) -> Iterator[_Comparison]:
    for number, source in enumerate(sources):
        names = Names.parse({**mapping, **source.mapping}, FIELDS)
        for row in drawn(source, seed + number):
            try:
                for talks, good, tie in _examples(row, names, paired):
                    rendered = tuple(render(talk, tokenizer, Learn.last) for talk in talks)
                    yield _Comparison(number, row, rendered, good, tie)
            except DataError as problem:
                yield _Comparison(number, row, problem=problem)


def _examples(row: Row, names: Names, paired: bool) -> list[tuple[tuple[Conversation, ...], bool, bool]]:
    """What a row compares: conversations, whether a single one is good, and whether two are tied."""
    if row.error:
        raise row.error
    if paired:
        pair = parse_pair(row.value, names)
        return [((pair.chosen, pair.rejected), True, pair.tie)]
    return [((judged.conversation,), judged.good, False) for judged in parse_judged(row.value, names)]


def _batches(rows: Iterator[_Comparison]) -> Iterator[list[_Comparison]]:
    while batch := list(islice(rows, BATCH_ROWS)):
        yield batch


def _encode(
    batch: list[_Comparison],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    report: PreferenceReport,
    dropped: TextIO,
) -> list[dict[str, Any]]:
    """The rows that a batch gives, counted."""
    usable = [comparison for comparison in batch if not comparison.problem]
    texts = [text for comparison in usable for text in comparison.rendered]
    encoded = iter(tokenize(texts, tokenizer) if texts else [])
    kept = []
    for comparison in batch:
        counts, place = report.sources[comparison.source], comparison.row.place
        report.rows += 1
        counts.rows += 1
        if comparison.problem:
            report.identical += isinstance(comparison.problem, IdenticalPairError)
            report.drop(Dropped(place, "bad row", comparison.problem.what), dropped)
            continue
        prompt, answers = split_answers([next(encoded) for _ in comparison.rendered])
        whole, answers = answers, [answer[: max(0, max_length - len(prompt))] for answer in answers]
        if reason := _lost(prompt, whole, answers, max_length):
            report.drop(Dropped(place, "too long", reason), dropped)
            continue
        _count(report, comparison, prompt, answers)
        report.cut += answers != whole
        counts.kept += 1
        sides = ("chosen_ids", "rejected_ids") if len(answers) == 2 else ("completion_ids",)
        row = {"prompt_ids": prompt, **dict(zip(sides, answers, strict=True)), "place": str(place)}
        kept.append(row if len(answers) == 2 else row | {"label": comparison.good})
    return kept


def split_answers(whole: Sequence[Encoded]) -> tuple[list[int], list[list[int]]]:
    """Conversations that begin alike, taken apart.

    Args:
        whole: Encoded conversations of which only the last answer is learned.

    Returns:
        Token ids of the prompt that they share, and of each answer, up to its end-of-sequence token. Where tokens
        reach across the border between the two, they belong to the answers.
    """
    learned = [[index for index, label in enumerate(one.labels) if label != IGNORED] for one in whole]
    ids = [one.input_ids[: positions[-1] + 1] for one, positions in zip(whole, learned, strict=True)]
    start = min(positions[0] for positions in learned)
    start = len(os.path.commonprefix([one[:start] for one in ids]))
    return ids[0][:start], [one[start:] for one in ids]


def _lost(prompt: list[int], whole: list[list[int]], answers: list[list[int]], max_length: int) -> str:
    """Why nothing can be learned of answers that were cut, if so."""
    if not answers[0] or not answers[-1]:
        size = len(prompt) + max(map(len, whole))
        return f"its answer begins at token {len(prompt) + 1:,} of {size:,}, past --max-length {max_length:,}"
    if len(answers) == 2 and answers[0] == answers[1]:
        return f"its answers differ only past --max-length {max_length:,}"
    return ""


def _count(report: PreferenceReport, comparison: _Comparison, prompt: list[int], answers: list[list[int]]) -> None:
    sizes = [len(answer) for answer in answers]
    if len(answers) == 2:
        report.pairs += 1
        report.ties += comparison.tie
        report.chosen_longer += sizes[0] > sizes[1]
    else:
        report.good += comparison.good
        report.bad += not comparison.good
    report.tokens += sum(len(prompt) + size for size in sizes)
    report.learned += sum(sizes)
    report.longest = max(report.longest, len(prompt) + max(sizes))


def _stopped(comparison: _Comparison, after: Iterator[_Comparison]) -> RowError:
    assert comparison.problem
    same_file = takewhile(lambda other: other.source == comparison.source, after)
    bad = [other.problem is not None for other in islice(same_file, LOOK_AHEAD)]
    return RowError(comparison.row.place, comparison.problem, extent=extent_of(bad))


def _samples(sources: Sequence[Source], mapping: Mapping[str, str], paired: bool) -> Iterator[tuple[Conversation, str]]:
    """Conversations of the sources as what comes before the better answer, and that answer."""
    for source in sources:
        names = Names.parse({**mapping, **source.mapping}, FIELDS)
        for row in source:
            with suppress(DataError):
                for talks, good, _ in _examples(row, names, paired):
                    *before, answer = talks[0].messages
                    if good:
                        yield replace(talks[0], messages=tuple(before)), answer.content

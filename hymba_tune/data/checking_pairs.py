"""The check of files of preferences: what `check_sources` counts, and what only pairs have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice

from transformers import PreTrainedTokenizerBase

from hymba_tune.config import Learn
from hymba_tune.data.chat import Rendered, render, tokenize
from hymba_tune.data.check_counts import Check, FileCheck, Pairs, general
from hymba_tune.data.duplicates import Seen
from hymba_tune.data.encoding import BATCH_ROWS
from hymba_tune.data.formats import Names
from hymba_tune.data.preference_dataset import split_answers
from hymba_tune.data.preferences import FIELDS, IdenticalPairError, Pair, parse_pair
from hymba_tune.data.rows import Row
from hymba_tune.data.sources import Source
from hymba_tune.errors import DataError

FORMAT = "chosen and rejected"


@dataclass(frozen=True, slots=True)
class _Read:
    row: Row
    pair: Pair
    texts: tuple[Rendered, Rendered]


def holds_pairs(source: Source, mapping: Mapping[str, str]) -> bool:
    """Whether the first row that can be read has a chosen and a rejected answer, under these names.

    Raises:
        DataError: If the source cannot be read.
    """
    columns = {**mapping, **source.mapping}
    wanted = {columns.get(side, side) for side in ("chosen", "rejected")}
    first = next((row.value for row in source if not row.error), None)
    return isinstance(first, Mapping) and wanted <= first.keys()


def check_pairs(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    mapping: Mapping[str, str],
    check: Check,
    file: FileCheck,
    seen: Seen,
    progress: Callable[[int], None] | None,
) -> None:
    """Count what a file of pairs holds into ``check``.

    Raises:
        DataError: If the source cannot be read.
        ConfigError: If ``mapping`` names a field or role that does not exist.
    """
    names = Names.parse({**mapping, **source.mapping}, FIELDS)
    check.pairs = check.pairs or Pairs()
    rows = iter(source)
    while batch := list(islice(rows, BATCH_ROWS)):
        read = [one for row in batch if (one := _read(row, names, tokenizer, check, file))]
        encoded = iter(tokenize([text for one in read for text in one.texts], tokenizer) if read else [])
        for one in read:
            seen.add(one.pair.chosen, one.row.place, beside=one.pair.rejected)
            _measure(*split_answers([next(encoded), next(encoded)]), one.pair, check, check.pairs)
        if progress:
            progress(check.rows)


def _read(row: Row, names: Names, tokenizer: PreTrainedTokenizerBase, check: Check, file: FileCheck) -> _Read | None:
    check.rows += 1
    file.rows += 1
    file.formats["unreadable" if row.error else FORMAT] += 1
    try:
        if row.error:
            raise row.error
        pair = parse_pair(row.value, names)
        return _Read(
            row, pair, (render(pair.chosen, tokenizer, Learn.last), render(pair.rejected, tokenizer, Learn.last))
        )
    except DataError as problem:
        check.bad_rows += 1
        if check.pairs and isinstance(problem, IdenticalPairError):
            check.pairs.identical += 1
        check.problems.add(general(problem.what), f"{row.place}: {problem.what}", problem.details["to fix"])
        return None


def _measure(prompt: list[int], answers: list[list[int]], pair: Pair, check: Check, pairs: Pairs) -> None:
    sizes = [len(answer) for answer in answers]
    room = check.max_length - len(prompt)
    pairs.rows += 1
    pairs.ties += pair.tie
    pairs.chosen_longer += sizes[0] > sizes[1]
    pairs.rejected_longer += sizes[0] < sizes[1]
    check.lengths.rows[len(prompt) + max(sizes)] += 1
    if room <= 0:
        check.too_long += 1
        return
    kept = [min(size, room) for size in sizes]
    check.cut += kept != sizes
    check.tokens_lost += sum(sizes) - sum(kept)
    check.learned += sum(kept)
    check.tokens += 2 * len(prompt) + sum(kept)

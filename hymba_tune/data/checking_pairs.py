"""The check of files of preferences: what `check_sources` counts, and what only pairs have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from hymba_tune.data.check_counts import Check, FileCheck, PairCounts, general
from hymba_tune.data.comparisons import comparisons, split_answers
from hymba_tune.data.duplicates import SeenRows
from hymba_tune.data.encoding import encoded_batches
from hymba_tune.data.preferences import IdenticalPairError
from hymba_tune.data.sources import Source

if TYPE_CHECKING:  # importing transformers imports torch
    from transformers import PreTrainedTokenizerBase

FORMAT = "chosen and rejected"


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
    seen: SeenRows,
    progress: Callable[[int], None] | None,
) -> None:
    """Count what a file of pairs holds into ``check``.

    Raises:
        DataError: If the source cannot be read.
        ConfigError: If ``mapping`` names a field or role that does not exist.
    """
    check.pairs = check.pairs or PairCounts()
    rows = comparisons([source], tokenizer, paired=True, mapping=mapping)
    for batch in encoded_batches(rows, tokenizer):
        for one in batch:
            check.rows += 1
            file.rows += 1
            file.formats["unreadable" if one.row.error else FORMAT] += 1
            if problem := one.problem:
                check.bad_rows += 1
                check.pairs.identical += isinstance(problem, IdenticalPairError)
                what = f"{one.row.place}: {problem.what}"
                check.problems.add(general(problem.what), what, problem.details["to fix"])
                continue
            chosen, rejected = one.talks
            seen.add(chosen, one.row.place, beside=rejected)
            _measure(*split_answers(one.encoded), one.tie, check, check.pairs)
        if progress:
            progress(check.rows)


def _measure(prompt: list[int], answers: list[list[int]], tie: bool, check: Check, pairs: PairCounts) -> None:
    sizes = [len(answer) for answer in answers]
    room = check.max_length - len(prompt)
    pairs.rows += 1
    pairs.ties += tie
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

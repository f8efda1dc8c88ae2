"""Checks files of preference pairs: the counts of `check_sources`, and those of pairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from hymba_tune.data.check_counts import Check, FileCheck, PairCounts, general, note_special_tokens
from hymba_tune.data.comparisons import FittedAnswers, comparisons, fit_answers
from hymba_tune.data.duplicates import SeenRows
from hymba_tune.data.encoding import encoded_batches
from hymba_tune.data.preferences import IdenticalPairError
from hymba_tune.data.sources import Source
from hymba_tune.data.special_tokens import SpecialTokens

if TYPE_CHECKING:  # importing transformers imports torch
    from transformers import PreTrainedTokenizerBase

FORMAT = "chosen and rejected"


def holds_pairs(source: Source, mapping: Mapping[str, str]) -> bool:
    """Return whether the first readable row has a chosen and a rejected answer, under these names.

    Raises:
        DataError: If the source cannot be read.
    """
    columns = {**mapping, **source.mapping}
    required = {columns.get(side, side) for side in ("chosen", "rejected")}
    first = next((row.value for row in source if not row.error), None)
    return isinstance(first, Mapping) and required <= first.keys()


def check_pairs(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    mapping: Mapping[str, str],
    check: Check,
    file: FileCheck,
    seen: SeenRows,
    progress: Callable[[int], None] | None,
) -> None:
    """Count the pairs of a source into ``check``.

    Args:
        source: The source of the pairs.
        tokenizer: The model's tokenizer, with a chat template.
        mapping: Column and role names, as for `Names.parse`.
        check: The check to add to.
        file: The counts of this source.
        seen: The rows so far, to recognize repeats.
        progress: Called with the number of rows read so far.

    Raises:
        DataError: If the source cannot be read.
        ConfigError: If ``mapping`` names a field or role that does not exist.
    """
    check.pairs = check.pairs or PairCounts()
    rows = comparisons([source], tokenizer, paired=True, mapping=mapping)
    special = SpecialTokens.of(tokenizer)
    for batch in encoded_batches(rows, tokenizer):
        for pair in batch:
            check.rows += 1
            file.rows += 1
            file.formats["unreadable" if pair.row.error else FORMAT] += 1
            if problem := pair.problem:
                check.bad_rows += 1
                check.pairs.identical += isinstance(problem, IdenticalPairError)
                what = f"{pair.row.place}: {problem.what}"
                check.problems.add(general(problem.what), what, problem.details["to fix"])
                continue

            chosen, rejected = pair.conversations
            seen.add(chosen, pair.row.place, rejected=rejected)
            tokens = (token for conversation in pair.conversations for token in special.find(conversation))
            note_special_tokens(tokens, pair.row.place, check)
            _count_tokens(fit_answers(pair.encoded, check.max_length), check, check.pairs)
            check.pairs.ties += pair.tie
        if progress:
            progress(check.rows)


def _count_tokens(fitted: FittedAnswers, check: Check, pairs: PairCounts) -> None:
    prompt, uncut = fitted.prompt, [len(answer) for answer in fitted.uncut]
    pairs.rows += 1
    pairs.chosen_longer += uncut[0] > uncut[1]
    pairs.rejected_longer += uncut[0] < uncut[1]
    check.lengths.rows[len(prompt) + max(uncut)] += 1
    if fitted.unusable:
        check.too_long += 1
        return

    sizes = [len(answer) for answer in fitted.answers]
    check.cut += sizes != uncut
    check.tokens_lost += sum(uncut) - sum(sizes)
    check.learned += sum(sizes)
    check.tokens += 2 * len(prompt) + sum(sizes)

"""What a file holds, and whether it can be trained on: everything that a run would find, and what it would not say."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from transformers import PreTrainedTokenizerBase

from hymba_tune.config import Learn
from hymba_tune.data.chat import fit
from hymba_tune.data.duplicates import Duplicates, Seen
from hymba_tune.data.encoding import Reading, encoded_batches, readings
from hymba_tune.data.formats import Conversation, Names, recognise
from hymba_tune.data.messages import SHOWN_KEYS
from hymba_tune.data.sources import Source
from hymba_tune.errors import DataError

EXAMPLES = 3
"""Places that are kept of each kind of finding."""
KINDS = 40
"""Kinds of findings that are told apart; the rest is counted together, so that memory has a bound."""
OTHERS = "something else"
TWO_QUESTIONS, TWO_ANSWERS = "two messages from the user in a row", "two answers in a row"
NO_ANSWER_LAST = "the last message is no answer, so nothing is learned from it"
EMPTY_QUESTION = "an empty message from the user"
ODDITIES = {
    TWO_QUESTIONS: "make one message of them, or put the answer between",
    TWO_ANSWERS: "make one message of them, or put the question between",
    NO_ANSWER_LAST: "take it out, or add the answer",
    EMPTY_QUESTION: "write it, or take the row out",
}
"""What a run takes without a word, though it is seldom meant, and what to do about it."""
NUMBERS, ASIDES = re.compile(r"(?<![-\w])\d[\d,.]*"), re.compile(r" \([^()]*\)")


@dataclass
class Finding:
    """Something that is so in some rows.

    Attributes:
        what: In general: numbers and names are left out.
        rows: How many.
        examples: The first of them: where, and what it is there.
        fix: What to do about it.
    """

    what: str
    rows: int = 0
    examples: list[str] = field(default_factory=list)
    fix: str = ""


class Findings(dict[str, Finding]):
    """Findings by what they are, in the order in which they were met."""

    def add(self, what: str, example: str, fix: str = "") -> None:
        """Count one more."""
        what = what if what in self or len(self) < KINDS else OTHERS
        finding = self.setdefault(what, Finding(what, fix=fix))
        finding.rows += 1
        if len(finding.examples) < EXAMPLES:
            finding.examples.append(example)


@dataclass
class FileCheck:
    """One file: its rows by format, and why it cannot be read to its end, if so."""

    name: str
    rows: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    problem: DataError | None = None


@dataclass
class Lengths:
    """Tokens a row, before anything is cut.

    Attributes:
        rows: How many rows have a length, by length.
    """

    rows: Counter[int] = field(default_factory=Counter)

    def quantile(self, share: float) -> int:
        """The length that this share of the rows does not exceed."""
        sizes, counts = self.table()
        return int(sizes[np.searchsorted(np.cumsum(counts), share * counts.sum())]) if len(sizes) else 0

    def table(self) -> tuple[np.ndarray, np.ndarray]:
        """Lengths that occur, ascending, and how often."""
        sizes = np.array(sorted(self.rows))
        return sizes, np.array([self.rows[size] for size in sizes.tolist()])


@dataclass
class Pairs:
    """What only preferences have.

    Attributes:
        rows: Pairs that can be used.
        ties: Those whose row scores both answers the same.
        identical: Rows whose answers are the same; they are bad rows as well.
        chosen_longer: Pairs whose better answer has more tokens.
        rejected_longer: Pairs whose worse answer has more tokens.
    """

    rows: int = 0
    ties: int = 0
    identical: int = 0
    chosen_longer: int = 0
    rejected_longer: int = 0


@dataclass
class Check:
    """What the files hold.

    Attributes:
        max_length: The length that cuts and drops are counted at.
        files: One by one.
        rows: Rows read.
        bad_rows: Rows that would stop a run.
        problems: Why, by kind.
        notes: What is odd, but does not stop a run.
        hidden: Columns, and keys of messages, that the model is not shown, and in how many rows they hold something.
        lengths: Tokens a row.
        tokens: Tokens that are trained on.
        learned: Those of them that carry loss.
        cut: Conversations that lose their end.
        continued: Texts that go on in further rows.
        tokens_lost: Tokens cut off.
        too_long: Rows dropped, because their answers begin past the length.
        duplicates: Rows that say the same.
        pairs: Of preferences only.
    """

    max_length: int
    files: list[FileCheck] = field(default_factory=list)
    rows: int = 0
    bad_rows: int = 0
    problems: Findings = field(default_factory=Findings)
    notes: Findings = field(default_factory=Findings)
    hidden: Counter[str] = field(default_factory=Counter)
    lengths: Lengths = field(default_factory=Lengths)
    tokens: int = 0
    learned: int = 0
    cut: int = 0
    continued: int = 0
    tokens_lost: int = 0
    too_long: int = 0
    duplicates: Duplicates = field(default_factory=lambda: Duplicates(0, [], 0))
    pairs: Pairs | None = None

    @property
    def usable(self) -> bool:
        """Whether a run would go through."""
        return not self.bad_rows and not any(file.problem for file in self.files) and self.learned > 0


def check_sources(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    mapping: Mapping[str, str] | None = None,
    learn: Learn = Learn.all,
    progress: Callable[[int], None] | None = None,
) -> Check:
    """Read everything and count.

    Memory grows by 20 bytes a row, and by nothing else.

    Args:
        sources: Read one after the other; one that cannot be read does not keep the others from it.
        tokenizer: The model's, with a chat template.
        max_length: Tokens a row may have.
        mapping: ``--map``: see `Names.parse`.
        learn: Which answers are learned.
        progress: Called with the number of rows so far.

    Raises:
        ConfigError: If ``mapping`` names a field or role that does not exist.
    """
    from hymba_tune.data.checking_pairs import check_pairs, holds_pairs  # they count into what is defined here

    check, seen, mapping = Check(max_length), Seen(), mapping or {}
    for source in sources:
        file = FileCheck(source.name)
        check.files.append(file)
        try:
            if holds_pairs(source, mapping):
                check_pairs(source, tokenizer, mapping, check, file, seen, progress)
                continue
            names = Names.parse({**mapping, **source.mapping})
            for batch in encoded_batches(readings([source], tokenizer, mapping=mapping, learn=learn), tokenizer):
                for reading in batch:
                    _take(reading, names, check, file, seen)
                if progress:
                    progress(check.rows)
        except DataError as problem:
            file.problem = problem
    check.duplicates = seen.find()
    return check


def _take(reading: Reading, names: Names, check: Check, file: FileCheck, seen: Seen) -> None:
    place = reading.row.place
    check.rows += 1
    file.rows += 1
    file.formats[_format_of(reading, names)] += 1
    if reading.problem:
        check.bad_rows += 1
        problem = reading.problem
        check.problems.add(general(problem.what), f"{place}: {problem.what}", problem.details["to fix"])
        return
    assert reading.example
    seen.add(reading.example, place)
    for oddity in _oddities(reading):
        check.notes.add(oddity, str(place), ODDITIES[oddity])
    check.hidden.update(_hidden_keys(reading, names, known=check.hidden))
    _measure(reading, check)


def _measure(reading: Reading, check: Check) -> None:
    assert reading.encoded
    assert reading.rendered
    size, plain = len(reading.encoded.input_ids), reading.rendered.plain
    rows = fit(reading.encoded, check.max_length, split=plain)
    check.lengths.rows[size] += 1
    check.too_long += not rows
    check.tokens += (kept := sum(len(row.input_ids) for row in rows))
    check.learned += sum(row.learned for row in rows)
    if rows and size > check.max_length:
        check.continued += plain
        check.cut += not plain
        check.tokens_lost += size - kept


def general(what: str) -> str:
    """A problem without numbers and asides, by which rows are counted together."""
    return NUMBERS.sub("N", ASIDES.sub("", what))


def _format_of(reading: Reading, names: Names) -> str:
    if not isinstance(reading.row.value, Mapping):
        return "unreadable"
    try:
        return recognise(names.rename(reading.row.value), names).name
    except DataError:
        return "unknown"


def _oddities(reading: Reading) -> Iterator[str]:
    """Those of `ODDITIES` that a row has."""
    if not isinstance(reading.example, Conversation):
        return
    messages = reading.example.messages
    roles = [message.role for message in messages]
    if ("user", "user") in pairwise(roles):
        yield TWO_QUESTIONS
    if ("assistant", "assistant") in pairwise(roles):
        yield TWO_ANSWERS
    if roles[-1] != "assistant":
        yield NO_ANSWER_LAST
    if any(message.role == "user" and not message.content.strip() for message in messages):
        yield EMPTY_QUESTION


def _hidden_keys(reading: Reading, names: Names, known: Mapping[str, int]) -> set[str]:
    """Columns and keys of messages that hold something which the model is not shown."""
    row = reading.row.value
    assert isinstance(row, Mapping)
    fields = names.rename(row)
    form = recognise(fields, names)
    hidden = {str(key) for key, value in fields.items() if value and key not in form.fields}
    for name in form.required:
        messages = fields[name]
        for message in messages if isinstance(messages, list) else []:
            hidden |= {f"{name}[].{key}" for key, value in message.items() if value and key not in SHOWN_KEYS}
    return {key if key in known or len(known) < KINDS else OTHERS for key in hidden}

"""Alignment of two tokenizers on one text: where the tokens of one side begin among those of the other.

The student and the teacher each render a conversation with their own chat template and tokenizer. Only the answers are
aligned, byte by byte, and the end tokens of both sides are mapped to each other. Bytes around an answer that one side
only has (a template's white space, SentencePiece's first space) are removed from the tokens that contain them.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from os.path import commonprefix
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hymba_tune.config import Learn
from hymba_tune.data.formats import Example
from hymba_tune.distill.pair import (
    Answer,
    Side,
    TokenizedRow,
    TokenizerPair,
    Unaligned,
    for_teacher,
    shorten,
    tokenize_examples,
    without_output,
)
from hymba_tune.distill.spelling import END

Indices = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Alignment:
    """A row on both sides, and the alignment of its answers' tokens: N positions and S spans.

    The first token of a row, which nothing predicts, is in neither.

    Attributes:
        student_ids: The student's whole row.
        teacher_ids: The teacher's whole row.
        student: ``(N,)``, ascending: the position of each student token in the student's row.
        teacher: ``(N,)``: the position in the teacher's row of the token that covers its first byte.
        spelled: ``(N,)``: the number of bytes of that teacher token before this byte; 0 where both tokens begin there.
        first: ``(N,)``: whether that teacher token is the first of an answer.
        crossing: ``(N,)``: whether the student's token continues into the teacher's next token.
        spans: ``(S, 4)``: the smallest spans whose ends are boundaries on both sides: ``[begin, end)`` in the student's
            row, then in the teacher's.
    """

    student_ids: list[int]
    teacher_ids: list[int]
    student: Indices
    teacher: Indices
    spelled: Indices
    first: Flags
    crossing: Flags
    spans: Indices

    @property
    def plain(self) -> bool:
        """Whether this is a plain text or a part of one, which has no prompt before the learned tokens."""
        return not len(self.student) or int(self.student[0]) < 2


def align(examples: Sequence[Example], pair: TokenizerPair, learn: Learn = Learn.all) -> list[Alignment | Unaligned]:
    """Render and tokenize examples on both sides, and align them.

    Args:
        examples: A batch, which is faster than single examples.
        pair: The two tokenizers.
        learn: The answers to align: all, or at most the last of each conversation.

    Returns:
        For each example its alignment, or the reason why there is none: its bytes differ between the sides, it has half
        a character (a lone surrogate, which no tokenizer reads), a template cannot render it or leaves out a text of
        it, or it has a token for which the teacher has no output.
    """
    shown = [for_teacher(example, pair) for example in examples]
    students = tokenize_examples(examples, pair.student, learn)
    teachers = tokenize_examples(shown, pair.teacher, learn)
    return align_rows(students, teachers, pair)


def align_rows(
    students: Sequence[TokenizedRow | Unaligned], teachers: Sequence[TokenizedRow | Unaligned], pair: TokenizerPair
) -> list[Alignment | Unaligned]:
    """Align tokenized rows; see `align`."""
    checked = [_check(*rows, pair) for rows in zip(students, teachers, strict=True)]
    aligned = _align_checked([row for row in checked if isinstance(row, _Checked)])
    return [row if isinstance(row, Unaligned) else next(aligned) for row in checked]


class _Spelled(NamedTuple):
    """An answer on one side: its first token, the byte lengths of its tokens, and the bytes before the aligned part."""

    begin: int
    lengths: list[int]
    lead: int


class _Common(NamedTuple):
    """An answer on both sides, which share ``size`` bytes before the end token."""

    student: _Spelled
    teacher: _Spelled
    size: int


class _Checked(NamedTuple):
    """A row with the same answers on both sides."""

    student: TokenizedRow
    teacher: TokenizedRow
    answers: list[_Common]


def _check(
    student: TokenizedRow | Unaligned, teacher: TokenizedRow | Unaligned, pair: TokenizerPair
) -> _Checked | Unaligned:
    if isinstance(student, Unaligned):
        return student
    size = sum(len(answer.content) for answer in student.answers)
    if isinstance(teacher, Unaligned):
        return replace(teacher, bytes=size)
    if problem := without_output(teacher.ids, pair):
        return Unaligned("no output", problem, size)
    answers = []
    for number, (ours, theirs) in enumerate(zip(student.answers, teacher.answers, strict=True), start=1):
        if ours.content != theirs.content:
            what = f"the teacher's chat template writes answer {number} in another way than the student's"
            return _differing(what, ours.content, theirs.content, size)
        sides = (ours, student.ids, pair.student), (theirs, teacher.ids, pair.teacher)
        spelled = [_token_bytes(ids, answer, side) for answer, ids, side in sides]
        leads = [_lead(token_bytes, ours.content) for token_bytes in spelled]
        if None in leads:
            which = leads.index(None)
            what = f"the tokens of the {sides[which][2].whose}'s tokenizer do not spell answer {number}"
            return _differing(what, ours.content, b"".join(spelled[which]).removesuffix(END), size)

        # White space that both templates write before an answer is aligned with it.
        student_lead, teacher_lead = (lead or b"" for lead in leads)
        same = len(commonprefix([student_lead[::-1], teacher_lead[::-1]]))
        student_spelled = _Spelled(ours.begin, list(map(len, spelled[0])), len(student_lead) - same)
        teacher_spelled = _Spelled(theirs.begin, list(map(len, spelled[1])), len(teacher_lead) - same)
        answers.append(_Common(student_spelled, teacher_spelled, len(ours.content) + same))
    return _Checked(student, teacher, answers)


def _differing(what: str, content: bytes, other: bytes, size: int) -> Unaligned:
    """Return the reason for an answer that is other bytes on one side, with the first of them."""
    texts = [side.decode("utf-8", "replace").strip() for side in (content, other)]
    at = len(commonprefix(texts))
    first, second = (shorten(text[at:]) for text in texts)
    place = f"at byte {len(texts[0][:at].encode()) + 1:,} of {len(content):,}, {second} instead of {first}"
    composed, other_composed = (unicodedata.normalize("NFC", text) for text in texts)
    return Unaligned("Unicode form" if composed == other_composed else "bytes differ", f"{what}: {place}", size)


def _token_bytes(ids: list[int], answer: Answer, side: Side) -> list[bytes]:
    return list(map(side.spelling.tokens.__getitem__, ids[answer.begin : answer.end]))


def _lead(token_bytes: list[bytes], content: bytes) -> bytes | None:
    """Return the bytes that the tokens spell before an answer; None if they do not spell it and its end."""
    spelled = b"".join(token_bytes)
    lead = spelled.rfind(content, 0, -len(END))
    return spelled[:lead] if lead >= 0 and spelled.endswith(END) else None


@dataclass(frozen=True, slots=True)
class _Tokens:
    """One side's tokens of many concatenated answers: ``[start, end)`` in bytes of the answers, none empty.

    ``index`` is the position of a token in its row, ``before`` the number of its bytes before its answer, and ``first``
    whether it is the first token of an answer.
    """

    start: Indices
    end: Indices
    index: Indices
    before: Indices
    first: Flags


def _lay_out(answers: Sequence[_Spelled], sizes: Indices) -> _Tokens:
    """Concatenate answers of ``sizes`` bytes each and `END`, without the bytes around them."""
    counts = np.array([len(answer.lengths) for answer in answers], np.int64)
    lengths = np.fromiter(chain.from_iterable(answer.lengths for answer in answers), np.int64, counts.sum())
    ends = lengths.cumsum()
    totals = np.add.reduceat(lengths, counts.cumsum() - counts) if len(counts) else counts

    def each(values: Indices) -> Indices:
        return np.repeat(values, counts)

    lead = each(np.array([answer.lead for answer in answers], np.int64))
    ends -= each(totals.cumsum() - totals)
    size = each(sizes)
    close = each(totals) - len(END)
    base = each((sizes + len(END)).cumsum() - sizes - len(END))

    # Clipping gives the bytes around an answer no length: those before it, and those between it and END.
    def place(byte: Indices) -> Indices:
        placed: Indices = np.clip(byte - lead, 0, size) + np.clip(byte - close, 0, len(END)) + base
        return placed

    start, end = place(ends - lengths), place(ends)
    index = np.arange(len(lengths)) - each(counts.cumsum() - counts)
    index += each(np.array([answer.begin for answer in answers], np.int64))
    before = np.maximum(lead - (ends - lengths), 0)

    # Tokens of nothing but bytes around an answer have become empty.
    inside = end > start
    return _Tokens(start[inside], end[inside], index[inside], before[inside], (start == base)[inside])


def _align_checked(rows: Sequence[_Checked]) -> Iterator[Alignment]:
    """Align all rows at once, because a search per row would dominate the time."""
    if not rows:
        return
    answers = [answer for row in rows for answer in row.answers]
    sizes = np.array([answer.size for answer in answers], np.int64)
    ours = _lay_out([answer.student for answer in answers], sizes)
    theirs = _lay_out([answer.teacher for answer in answers], sizes)
    row_ends = np.cumsum([sum(answer.size + len(END) for answer in row.answers) for row in rows])
    row_of = np.searchsorted(row_ends, ours.start, side="right")

    # The teacher's token that covers the first byte of each student token. Neither may be the first of its row.
    covering = np.searchsorted(theirs.start, ours.start, side="right") - 1
    at = np.flatnonzero((ours.index > 0) & (theirs.index[covering] > 0))
    covering = covering[at]
    spelled = ours.start[at] - theirs.start[covering] + theirs.before[covering]
    crossing = ours.end[at] > theirs.end[covering]

    # A span ends wherever tokens of both sides end at the same byte.
    closing = np.searchsorted(theirs.end, ours.end)
    shared = np.flatnonzero(theirs.end[closing] == ours.end)
    spans = np.stack([*_spans(shared, ours.index), *_spans(closing[shared], theirs.index)], 1)
    known = (spans[:, 0] > 0) & (spans[:, 2] > 0)
    spans = spans[known]

    cuts, span_cuts = _cuts(row_of[at], len(rows)), _cuts(row_of[shared[known]], len(rows))
    for row, (begin, end), (span_begin, span_end) in zip(rows, pairwise(cuts), pairwise(span_cuts), strict=True):
        yield Alignment(
            student_ids=row.student.ids,
            teacher_ids=row.teacher.ids,
            student=ours.index[at[begin:end]],
            teacher=theirs.index[covering[begin:end]],
            spelled=spelled[begin:end],
            first=theirs.first[covering[begin:end]],
            crossing=crossing[begin:end],
            spans=spans[span_begin:span_end],
        )


def _spans(last: Indices, index: Indices) -> tuple[Indices, Indices]:
    """Return the begin and end of spans in their rows, from the indices of their last tokens among all tokens."""
    first = np.concatenate([[0], last[:-1] + 1]) if len(last) else last
    return index[first], index[last] + 1


def _cuts(rows: Indices, count: int) -> list[int]:
    """Return the bounds of each row's elements, from the row of every element."""
    cuts: list[int] = np.searchsorted(rows, np.arange(count + 1)).tolist()
    return cuts

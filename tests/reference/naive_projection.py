"""The projected target of one place, enumerated over the teacher's whole vocabulary by the formula."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

Segment = Callable[[bytes], list[int] | None]
Spell = Callable[[int], bytes]


def merge(text: Sequence[str], merges: Sequence[tuple[str, str]]) -> list[str]:
    """Byte-pair encoding: the earliest merge that applies, at its leftmost place, until none does."""
    parts = list(text)
    while True:
        pairs = list(pairwise(parts))
        ranked = [merges.index(pair) for pair in pairs if pair in merges]
        if not ranked:
            return parts
        at = pairs.index(merges[min(ranked)])
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


REST = -1
"""A placeholder for any token outside the support."""


def student_token_after(token: bytes, beginning: bytes, segment: Segment, spell: Spell) -> int | None:
    """The student_token of a token's segmentation that begins right after this beginning of it, if one does.

    The rest where the token ends there, or the student cannot write it.
    """
    student_tokens = segment(token)
    if not token.startswith(beginning):
        return None
    if token == beginning or student_tokens is None:
        return REST
    at = b""
    for student_token in student_tokens:
        if at == beginning:
            return student_token
        at += spell(student_token)
    return None


def mass(
    vocabulary: Sequence[bytes],
    now: Sequence[float],
    before: Sequence[float] | None,
    previous: int,
    u: bytes,
    first: Callable[[int], dict[int, float]],
    segment: Segment,
    spell: Spell,
) -> tuple[dict[int, float], float]:
    """Mass by student_token, and the rest_mass's: of tokens that end here, and of those that the student cannot write.

    Args:
        vocabulary: What the teacher's tokens spell.
        now: Its probabilities where the student's next token begins.
        before: Those one token earlier; None at an answer's first.
        previous: The token there.
        u: Bytes of the token at ``now`` that the student has spelled.
        first: Of a token's first student_token, the shares.
        segment: The student's student_tokens of some bytes, or None.
        spell: Bytes of a student_token.
    """
    mass_of: dict[int, float] = {REST: 0.0}
    earlier = 1.0 if before is None else before[previous]
    for token, bytes_ in enumerate(vocabulary):
        student_token = student_token_after(bytes_, u, segment, spell)
        shares = first(token) or {REST: 1.0}
        if u:
            shares = {} if student_token is None else {student_token: 1.0}
        for student_token, share in shares.items():
            mass_of[student_token] = mass_of.get(student_token, 0) + earlier * now[token] * share
    v = vocabulary[previous] + u
    for token, bytes_ in enumerate(vocabulary if before else ()):
        student_token = student_token_after(bytes_, v, segment, spell)
        if student_token is not None and (u or bytes_ != v):
            mass_of[student_token] = mass_of.get(student_token, 0) + before[token]
    return mass_of, mass_of.pop(REST)

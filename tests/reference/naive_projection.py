"""The projected target of one place, enumerated over the teacher's whole vocabulary as the formula stands."""

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


def piece_after(token: bytes, beginning: bytes, segment: Segment, spell: Spell) -> int | None:
    """The piece of a token's segmentation that begins right after this beginning of it, if one does."""
    pieces = segment(token)
    if not token.startswith(beginning) or pieces is None:
        return None
    at = b""
    for piece in pieces:
        if at == beginning:
            return piece
        at += spell(piece)
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
    """Mass by piece, and the bucket's.

    Args:
        vocabulary: What the teacher's tokens spell.
        now: Its probabilities where the student's next token begins.
        before: Those one token earlier; None at an answer's first.
        previous: The token there.
        u: Bytes of the token at ``now`` that the student has spelled.
        first: Of a token's first piece, the shares.
        segment: The student's pieces of some bytes, or None.
        spell: Bytes of a piece.
    """
    found: dict[int, float] = {}
    bucket = 0.0
    earlier = 1.0 if before is None else before[previous]
    for token, bytes_ in enumerate(vocabulary):
        if not u:
            for piece, share in first(token).items():
                found[piece] = found.get(piece, 0) + earlier * now[token] * share
        elif (piece := piece_after(bytes_, u, segment, spell)) is not None:
            found[piece] = found.get(piece, 0) + earlier * now[token]
        elif bytes_ == u and segment(u) is not None:
            bucket += earlier * now[token]
    if before is None:
        return found, bucket
    v = vocabulary[previous] + u
    for token, bytes_ in enumerate(vocabulary):
        if bytes_ != v and (piece := piece_after(bytes_, v, segment, spell)) is not None:
            found[piece] = found.get(piece, 0) + before[token]
        elif u and bytes_ == v and segment(v) is not None:
            bucket += before[token]
    return found, bucket

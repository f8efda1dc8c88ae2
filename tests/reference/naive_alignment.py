"""Where two tokenizers' tokens meet on one answer, byte by byte."""

from __future__ import annotations

from typing import NamedTuple


class Position(NamedTuple):
    """A student's token: where it and the teacher's token at its first byte stand, and how they lie to each other."""

    student: int
    teacher: int
    spelled: int
    first: bool
    crossing: bool


def owners(pieces: list[bytes], begin: int, size: int) -> list[tuple[int, int]]:
    """For each byte of the answer, which piece it is of, and the how many-th byte of that piece.

    The pieces may spell more than the answer before it and, but for the last piece, after it.
    """
    flat = [(index, byte) for index, piece in enumerate(pieces[:-1]) for byte in range(len(piece))]
    end = [(len(pieces) - 1, byte) for byte in range(len(pieces[-1]))]
    return flat[begin : begin + size] + end


def both_owners(
    student: list[bytes], teacher: list[bytes], answer: bytes
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Those of both sides, and of the bytes that both spell before the answer."""
    bodies = [b"".join(pieces[:-1]) for pieces in (student, teacher)]
    begins = [body.rfind(answer) for body in bodies]
    assert min(begins) >= 0
    size = len(answer)
    while min(begins) and bodies[0][begins[0] - 1] == bodies[1][begins[1] - 1]:
        begins, size = [begin - 1 for begin in begins], size + 1
    return owners(student, begins[0], size), owners(teacher, begins[1], size)


def positions(student: list[bytes], teacher: list[bytes], answer: bytes) -> list[Position]:
    """Every token of the student's that has a byte of the answer."""
    ours, theirs = both_owners(student, teacher, answer)
    result = []
    for byte, (index, _) in enumerate(ours):
        if byte and ours[byte - 1][0] == index:
            continue
        last = max(place for place, (owner, _) in enumerate(ours) if owner == index)
        token, spelled = theirs[byte]
        result.append(Position(index, token, spelled, token == theirs[0][0], theirs[last][0] != token))
    return result


def spans(student: list[bytes], teacher: list[bytes], answer: bytes) -> list[tuple[int, int, int, int]]:
    """The smallest spans that both bound: ``[begin, end)`` of the student's tokens and of the teacher's."""
    ours, theirs = both_owners(student, teacher, answer)
    result, begin = [], 0
    for end in range(1, len(ours) + 1):
        if end < len(ours) and (ours[end - 1][0] == ours[end][0] or theirs[end - 1][0] == theirs[end][0]):
            continue
        result.append((ours[begin][0], ours[end - 1][0] + 1, theirs[begin][0], theirs[end - 1][0] + 1))
        begin = end
    return result

"""Finds rows with the same content in 20 bytes per row: two hashes of 8 bytes and a number of 4."""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from dataclasses import dataclass, field

import numpy as np

from hymba_tune.data.formats import Conversation, Example
from hymba_tune.data.rows import RowLocation

EXAMPLES = 3
NOT_WORDS = re.compile(r"[\W_]+")


def content_hash(example: Example) -> int:
    """Hash all content that affects training to 64 bits."""
    if not isinstance(example, Conversation):
        return _hash("text", example.text)
    messages = [(message.role, message.content, message.weight) for message in example.messages]
    return _hash("chat", json.dumps([messages, example.tools, example.contexts], ensure_ascii=False, sort_keys=True))


def prompt_hash(example: Example) -> int:
    """Hash the words before the last answer, or of a text, to 64 bits, without case and punctuation."""
    if not isinstance(example, Conversation):
        return _hash("text", _words(example.text))
    last = max(index for index, message in enumerate(example.messages) if message.role == "assistant")
    return _hash("chat", *(f"{message.role} {_words(message.content)}" for message in example.messages[:last]))


def text_hash(text: str) -> int:
    """Hash a text to 64 bits."""
    return _hash("row", text)


def _words(text: str) -> str:
    return NOT_WORDS.sub(" ", text).strip().casefold() or text.strip()


def _hash(*parts: str) -> int:
    return int.from_bytes(hashlib.blake2b("\x1f".join(parts).encode(), digest_size=8).digest())


@dataclass
class Duplicates:
    """The result of `SeenRows`.

    Attributes:
        rows: Rows with exactly the content of an earlier row.
        examples: The first of them: the place of each, and the place of the earlier row.
        other_answers: Rows whose prompt occurs earlier with another answer.
    """

    rows: int
    examples: list[tuple[str, str]]
    other_answers: int


@dataclass
class SeenRows:
    """Hashes and places of the rows so far."""

    _contents: array[int] = field(default_factory=lambda: array("Q"))
    _prompts: array[int] = field(default_factory=lambda: array("Q"))
    _numbers: array[int] = field(default_factory=lambda: array("I"))
    _files: list[tuple[int, RowLocation]] = field(default_factory=list)

    def add(self, example: Example, place: RowLocation, *, rejected: Example | None = None) -> None:
        """Add a row. The rows of a file must come one after the other.

        Args:
            example: The row's example; the chosen one of a pair.
            place: Where the row was read.
            rejected: The rejected example of a pair.
        """
        if not self._files or self._files[-1][1].file != place.file:
            self._files.append((len(self._numbers), place))
        contents = [content_hash(side) for side in (example, rejected) if side]
        self._contents.append(contents[0] if rejected is None else _hash(*map(str, contents)))
        self._prompts.append(prompt_hash(example))
        self._numbers.append(min(place.number, 2**32 - 1))

    def find(self) -> Duplicates:
        """Find the repeats by sorting the hashes."""
        contents = np.frombuffer(self._contents, dtype=np.uint64)
        prompts = np.frombuffer(self._prompts, dtype=np.uint64)
        # A stable sort keeps equal rows in their order: the first of each group is the one that the others repeat.
        order = np.argsort(contents, kind="stable")
        ranked = contents[order]
        first = np.r_[True, ranked[1:] != ranked[:-1]][: len(ranked)]
        repeats = order[~first]
        originals = order[np.maximum.accumulate(np.where(first, np.arange(len(order)), 0))][~first]

        earliest = np.argsort(repeats)[:EXAMPLES]
        examples = [(self._place(int(repeats[i])), self._place(int(originals[i]))) for i in earliest]
        distinct = prompts[order[first]]
        return Duplicates(len(repeats), examples, len(distinct) - len(np.unique(distinct)))

    def _place(self, index: int) -> str:
        place = next(place for start, place in reversed(self._files) if start <= index)
        return str(RowLocation(place.file, self._numbers[index], place.unit))

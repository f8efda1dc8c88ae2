"""How the student's tokenizer parts what a teacher's token spells."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

from tokenizers import Tokenizer

from hymba_tune.distill.pair import Side
from hymba_tune.distill.spelling import CHARACTER_OF, describe

BATCH = 8192
"""Tokens parted at a time: what bounds memory."""
STRAY = re.compile("([\udc80-\udcff]+)")
"""Bytes that are no UTF-8, as Python escapes them."""

Pieces = list[int] | None


class Segmenter:
    """Parts bytes as the student does in the midst of a text: without the space it puts before one.

    Bytes that are no whole characters become the tokens of single bytes, where the student has such.
    """

    def __init__(self, side: Side) -> None:
        self._spelling = side.spelling
        self._vocabulary = side.tokenizer.get_vocab()
        bare = _bare(side)
        self._text = Tokenizer.from_str(json.dumps(bare))
        self._alphabet = Tokenizer.from_str(json.dumps(bare | {"normalizer": None, "pre_tokenizer": None}))

    def __call__(self, spelled: Sequence[bytes]) -> Iterator[Pieces]:
        """The student's tokens of each spelling; None where they would not spell it."""
        for begin in range(0, len(spelled), BATCH):
            batch = spelled[begin : begin + BATCH]
            runs = list(map(self._runs, batch))
            texts = [run for parts in runs for run in parts if isinstance(run, str)]
            parted = iter(self._text.encode_batch_fast(texts, add_special_tokens=False))
            for token, parts in zip(batch, runs, strict=True):
                found = (next(parted).ids if isinstance(run, str) else self._stray(run) for run in parts)
                pieces = list(chain.from_iterable(found))
                yield pieces if token and self._spelling.spell(pieces) == token else None

    def _runs(self, token: bytes) -> list[str | bytes]:
        """A token as text and stray bytes; byte-level tokens of which some are stray, as bytes altogether."""
        parts = STRAY.split(token.decode("utf-8", "surrogateescape"))
        if len(parts) > 1 and self._spelling.byte_level:
            return [token]
        return [part.encode("utf-8", "surrogateescape") if place % 2 else part for place, part in enumerate(parts)]

    def _stray(self, run: bytes) -> list[int]:
        if self._spelling.byte_level:
            ids: list[int] = self._alphabet.encode("".join(map(CHARACTER_OF.__getitem__, run))).ids
            return ids
        tokens = [self._vocabulary.get(f"<0x{byte:02X}>") for byte in run]
        return [token for token in tokens if token is not None]


def tokenizer_within(side: Side) -> Tokenizer:
    """A tokenizer of what stands in the midst of a text: without the space before one, and without special tokens."""
    return Tokenizer.from_str(json.dumps(_bare(side)))


def _bare(side: Side) -> dict[str, Any]:
    described = describe(side.tokenizer)
    ordinary = [token for token in described["added_tokens"] if not token["special"]]
    bare = described | {"added_tokens": ordinary, "post_processor": None}
    return bare | {name: _without_prefix(described[name]) for name in ("normalizer", "pre_tokenizer")}


def _without_prefix(step: dict[str, Any] | None) -> dict[str, Any] | None:
    """A normalizer or pre-tokenizer that puts nothing before a text."""
    if step is None or step["type"] == "Prepend":
        return None
    for inside in ("normalizers", "pretokenizers"):
        if inside in step:
            kept = [bare for bare in map(_without_prefix, step[inside]) if bare]
            return step | {inside: kept} if kept else None
    silent = {"prepend_scheme": "never", "add_prefix_space": False}
    return step | {name: value for name, value in silent.items() if name in step}

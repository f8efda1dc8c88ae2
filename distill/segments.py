"""The student's segmentation of the bytes of a teacher token."""

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
"""Tokens segmented at a time, which bounds memory."""
STRAY = re.compile("([\udc80-\udcff]+)")
"""Bytes that are not valid UTF-8, as Python's surrogateescape writes them."""

StudentTokens = list[int] | None


class Segmenter:
    """Segments bytes as the student does inside a text, without the space that it adds before a text.

    Bytes that are not whole characters become the student's single-byte tokens, where it has them.
    """

    def __init__(self, side: Side) -> None:
        self._spelling = side.spelling
        self._vocabulary = side.tokenizer.get_vocab()
        bare = _bare(side)
        self._text = Tokenizer.from_str(json.dumps(bare))
        self._alphabet = Tokenizer.from_str(json.dumps(bare | {"normalizer": None, "pre_tokenizer": None}))

    def __call__(self, spelled: Sequence[bytes]) -> Iterator[StudentTokens]:
        """Return the student's tokens for each spelling; None where these do not spell it."""
        for begin in range(0, len(spelled), BATCH):
            batch = spelled[begin : begin + BATCH]
            runs = list(map(self._runs, batch))
            texts = [run for parts in runs for run in parts if isinstance(run, str)]
            encoded = iter(self._text.encode_batch_fast(texts, add_special_tokens=False))
            for token, parts in zip(batch, runs, strict=True):
                ids = (next(encoded).ids if isinstance(run, str) else self._stray(run) for run in parts)
                tokens = list(chain.from_iterable(ids))
                yield tokens if token and self._spelling.spell(tokens) == token else None

    def _runs(self, token: bytes) -> list[str | bytes]:
        """Split a token into text and stray bytes; a byte-level token with stray bytes stays whole, as bytes."""
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
    """Return a tokenizer for text inside a text: it adds no space and no special tokens."""
    return Tokenizer.from_str(json.dumps(_bare(side)))


def _bare(side: Side) -> dict[str, Any]:
    described = describe(side.tokenizer)
    ordinary = [token for token in described["added_tokens"] if not token["special"]]
    bare = described | {"added_tokens": ordinary, "post_processor": None}
    return bare | {name: _without_prefix(described[name]) for name in ("normalizer", "pre_tokenizer")}


def _without_prefix(step: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the normalizer or pre-tokenizer without what it adds before a text."""
    if step is None or step["type"] == "Prepend":
        return None
    for inside in ("normalizers", "pretokenizers"):
        if inside in step:
            steps = [bare for bare in map(_without_prefix, step[inside]) if bare]
            return step | {inside: steps} if steps else None
    silent = {"prepend_scheme": "never", "add_prefix_space": False}
    return step | {name: value for name, value in silent.items() if name in step}

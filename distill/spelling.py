"""What each token of a vocabulary spells, in bytes, as the tokenizer's own decoder says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from hymba_tune.errors import DataError

END = b"\xff\x00"
"""What the tokens that end a turn spell on both sides. No UTF-8 text has the byte 0xFF."""

REFUSED = {
    "WordPiece": "its tokens leave out the spaces of a text",
    "BPEDecoder": "its tokens do not say which white space follows a word",
    "CTC": "its tokens spell sounds",
}
"""By decoder, why texts cannot be had back byte for byte."""

BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")

Step = Callable[[str], str]


@dataclass(frozen=True)
class Spelling:
    """A vocabulary as bytes.

    Attributes:
        tokens: What each id spells; nothing, for ids that no token has. Several ids may spell the same: ``A`` and
            ``<0x41>``.
        byte_level: Whether pieces are written in GPT-2's alphabet of bytes, rather than as text.
    """

    tokens: tuple[bytes, ...]
    byte_level: bool

    def __len__(self) -> int:
        return len(self.tokens)

    def spell(self, ids: list[int]) -> bytes:
        """The bytes of some tokens in a row."""
        return b"".join(map(self.tokens.__getitem__, ids))

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Bytes of each token, ``(V,)``."""
        return np.fromiter(map(len, self.tokens), np.int64, len(self.tokens))


def read_spelling(tokenizer: PreTrainedTokenizerBase, ends: Collection[int] = ()) -> Spelling:
    """Read what the tokens spell out of a fast tokenizer's ``tokenizer.json``.

    Special tokens spell their own names, as they do where a text holds them literally. The space that SentencePiece
    puts before a text is part of the token that bears it.

    Args:
        tokenizer: Byte-level or of SentencePiece's kinds (BPE with byte fallback, or Unigram).
        ends: Ids of the tokens that end a turn; they spell `END`.

    Raises:
        DataError: If its tokens do not tell the bytes of a text.
    """
    described = describe(tokenizer)
    decoders = _decoders(described, tokenizer)
    byte_level = any(decoder["type"] == "ByteLevel" for decoder in decoders)
    byte_fallback = any(decoder["type"] == "ByteFallback" for decoder in decoders)
    replace = _replacements(decoders)
    added = {token["id"]: token for token in described["added_tokens"]}
    tokens = [b""] * (1 + max(tokenizer.get_vocab().values()))
    for piece, token in tokenizer.get_vocab().items():
        if token in ends:
            tokens[token] = END
        elif token in added and (byte_level or added[token]["special"]):
            tokens[token] = added[token]["content"].encode()
        elif byte_level:
            tokens[token] = bytes_of_alphabet(piece)
        elif byte_fallback and (hexadecimal := BYTE_PIECE.fullmatch(piece)):
            tokens[token] = bytes.fromhex(hexadecimal[1])
        else:
            tokens[token] = replace(piece).encode()
    return Spelling(tuple(tokens), byte_level)


def describe(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The content of a fast tokenizer's ``tokenizer.json``, without how it was last asked to pad and truncate.

    Raises:
        DataError: If it is not a fast tokenizer.
    """
    if not tokenizer.is_fast:
        raise DataError(
            f"{_name(tokenizer)} is not a fast tokenizer", expected="a tokenizer.json", fix="a teacher that has one"
        )
    described: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return described | {"padding": None, "truncation": None}


def _decoders(described: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """The steps of the decoder; where there is none, of the pre-tokenizer that it would undo."""
    steps = _flat(described["decoder"], "decoders") or [
        step
        for step in _flat(described["pre_tokenizer"], "pretokenizers")
        if step["type"] in ("ByteLevel", "Metaspace")
    ]
    reasons = [REFUSED[step["type"]] for step in steps if step["type"] in REFUSED]
    if described["model"].get("end_of_word_suffix"):
        reasons = [REFUSED["BPEDecoder"]]
    if not steps:
        reasons = ["it has no decoder that says what its tokens spell"]
    if reasons:
        raise DataError(
            f"{_name(tokenizer)} cannot be aligned: {reasons[0]}",
            expected="a byte-level tokenizer, or one of SentencePiece's kinds",
            fix="a teacher with such a tokenizer",
        )
    return steps


def _flat(step: dict[str, Any] | None, inside: str) -> list[dict[str, Any]]:
    """A decoder or pre-tokenizer as the list of its steps."""
    if step is None:
        return []
    if step["type"] != "Sequence":
        return [step]
    return [inner for part in step[inside] for inner in _flat(part, inside)]


def _replacements(decoders: list[dict[str, Any]]) -> Step:
    """What the decoder writes for others in every piece: a space for ``▁``."""
    pairs = []
    for decoder in decoders:
        if decoder["type"] == "Metaspace":
            pairs.append((decoder["replacement"], " "))
        elif decoder["type"] == "Replace" and "String" in decoder["pattern"]:
            pairs.append((decoder["pattern"]["String"], decoder["content"]))

    def replace(piece: str) -> str:
        for old, new in pairs:
            piece = piece.replace(old, new)
        return piece

    return replace


def _alphabet() -> dict[str, int]:
    """GPT-2's alphabet: bytes that print stand for themselves, the others for characters from 256 on."""
    printed = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + index): byte for index, byte in enumerate(others)}


BYTE_OF = _alphabet()
CHARACTER_OF = {byte: character for character, byte in BYTE_OF.items()}


def bytes_of_alphabet(piece: str) -> bytes:
    """The bytes of a byte-level piece; of one outside the alphabet, those of its text, as its decoder does."""
    try:
        return bytes(map(BYTE_OF.__getitem__, piece))
    except KeyError:
        return piece.encode()


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return f"the tokenizer {tokenizer.name_or_path}" if tokenizer.name_or_path else "the tokenizer"

"""The bytes that each token of a vocabulary spells, according to the tokenizer's decoder."""

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
"""The spelling of the end tokens on both sides. No UTF-8 text contains the byte 0xFF."""

REFUSED = {
    "WordPiece": "its tokens omit the spaces of a text",
    "BPEDecoder": "its tokens do not determine the white space after a word",
    "CTC": "its tokens spell sounds",
}
"""The reason, by decoder, why decoding does not return a text byte for byte."""

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")

Step = Callable[[str], str]


@dataclass(frozen=True)
class Spelling:
    """A vocabulary as bytes.

    Attributes:
        tokens: The bytes that each id spells; none for ids without a token. Several ids may spell the same bytes, such
            as ``A`` and ``<0x41>``.
        byte_level: Whether the vocabulary is written in GPT-2's alphabet of bytes, rather than as text.
    """

    tokens: tuple[bytes, ...]
    byte_level: bool

    def __len__(self) -> int:
        return len(self.tokens)

    def spell(self, ids: list[int]) -> bytes:
        """Return the bytes that a sequence of tokens spells."""
        return b"".join(map(self.tokens.__getitem__, ids))

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """The number of bytes of each token, ``(V,)``."""
        return np.fromiter(map(len, self.tokens), np.int64, len(self.tokens))


def read_spelling(tokenizer: PreTrainedTokenizerBase, ends: Collection[int] = ()) -> Spelling:
    """Read the spelling of the tokens from a fast tokenizer's ``tokenizer.json``.

    Special tokens spell their names, as they do where a text contains them literally. The space that SentencePiece adds
    before a text belongs to the token that contains it.

    Args:
        tokenizer: A byte-level or SentencePiece tokenizer (BPE with byte fallback, or Unigram).
        ends: The ids of the tokens that end an answer; they spell `END`.

    Raises:
        DataError: If its tokens do not determine the bytes of a text.
    """
    described = describe(tokenizer)
    decoders = _decoders(described, tokenizer)
    byte_level = any(decoder["type"] == "ByteLevel" for decoder in decoders)
    byte_fallback = any(decoder["type"] == "ByteFallback" for decoder in decoders)
    replace = _replacements(decoders)
    added = {token["id"]: token for token in described["added_tokens"]}
    tokens = [b""] * (1 + max(tokenizer.get_vocab().values()))
    for written, token in tokenizer.get_vocab().items():
        if token in ends:
            tokens[token] = END
        elif token in added and (byte_level or added[token]["special"]):
            tokens[token] = added[token]["content"].encode()
        elif byte_level:
            tokens[token] = bytes_of_alphabet(written)
        elif byte_fallback and (hexadecimal := BYTE_TOKEN.fullmatch(written)):
            tokens[token] = bytes.fromhex(hexadecimal[1])
        else:
            tokens[token] = replace(written).encode()
    return Spelling(tuple(tokens), byte_level)


def describe(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the content of a fast tokenizer's ``tokenizer.json``, without its current padding and truncation.

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
    """Return the steps of the decoder; without a decoder, the steps of the pre-tokenizer that it would undo."""
    steps = _flat(described["decoder"], "decoders") or [
        step
        for step in _flat(described["pre_tokenizer"], "pretokenizers")
        if step["type"] in ("ByteLevel", "Metaspace")
    ]
    reasons = [REFUSED[step["type"]] for step in steps if step["type"] in REFUSED]
    if described["model"].get("end_of_word_suffix"):
        reasons = [REFUSED["BPEDecoder"]]
    if not steps:
        reasons = ["it has no decoder, so the spelling of its tokens is unknown"]
    if reasons:
        raise DataError(
            f"{_name(tokenizer)} cannot be aligned: {reasons[0]}",
            expected="a byte-level or SentencePiece tokenizer",
            fix="a teacher with such a tokenizer",
        )
    return steps


def _flat(step: dict[str, Any] | None, inside: str) -> list[dict[str, Any]]:
    """Return the steps of a decoder or pre-tokenizer."""
    if step is None:
        return []
    if step["type"] != "Sequence":
        return [step]
    return [inner for part in step[inside] for inner in _flat(part, inside)]


def _replacements(decoders: list[dict[str, Any]]) -> Step:
    """Return the replacements that the decoder makes in every token, such as a space for ``▁``."""
    pairs = []
    for decoder in decoders:
        if decoder["type"] == "Metaspace":
            pairs.append((decoder["replacement"], " "))
        elif decoder["type"] == "Replace" and "String" in decoder["pattern"]:
            pairs.append((decoder["pattern"]["String"], decoder["content"]))

    def replace(written: str) -> str:
        for old, new in pairs:
            written = written.replace(old, new)
        return written

    return replace


def _alphabet() -> dict[str, int]:
    """Return GPT-2's alphabet: printable bytes map to themselves, the others to characters from 256 on."""
    printed = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + index): byte for index, byte in enumerate(others)}


BYTE_OF = _alphabet()
CHARACTER_OF = {byte: character for character, byte in BYTE_OF.items()}


def bytes_of_alphabet(written: str) -> bytes:
    """Return the bytes of a byte-level token; outside the alphabet, the bytes of its text, as the decoder does."""
    try:
        return bytes(map(BYTE_OF.__getitem__, written))
    except KeyError:
        return written.encode()


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return f"the tokenizer {tokenizer.name_or_path}" if tokenizer.name_or_path else "the tokenizer"

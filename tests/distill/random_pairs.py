"""Small random tokenizers of both kinds, with the naive twin's way to part bytes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hymba_tune.distill.pair import Side, TokenizerPair, make_pair
from hymba_tune.distill.spelling import CHARACTER_OF
from tests.reference.naive_projection import Segment, merge

LETTERS = "ab é€"
CHARACTERS = LETTERS + "▁"
"""SentencePiece cannot write tokens with the last one, whose first byte is that of the letter before it."""
TEXTS = st.text(LETTERS, min_size=1, max_size=12)
Merges = Sequence[tuple[str, str]]


@st.composite
def merges(draw: st.DrawFn, symbols: str) -> Merges:
    """Merges that build on each other, as a trained tokenizer's do."""
    parts, found = list(symbols), []
    for _ in range(draw(st.integers(0, 12))):
        pair = draw(st.sampled_from(parts)), draw(st.sampled_from(parts))
        if "".join(pair) not in parts:
            found.append(pair)
            parts.append("".join(pair))
    return found


BYTE_LEVEL_MERGES = merges("".join(CHARACTER_OF[byte] for byte in CHARACTERS.encode()))
SENTENCEPIECE_MERGES = merges("▁ab")


def byte_level(pairs: Merges) -> PreTrainedTokenizerFast:
    """All bytes, what the merges make, and a token that ends."""
    pieces = [*CHARACTER_OF.values(), *("".join(pair) for pair in pairs)]
    tokenizer = Tokenizer(models.BPE({piece: token for token, piece in enumerate(pieces)}, list(pairs)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<end>"), AddedToken("<begin>")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", bos_token="<begin>")


def sentencepiece(pairs: Merges) -> PreTrainedTokenizerFast:
    """As Hymba's, with bytes for the letter that has no piece."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁ab", *map("".join, pairs)]
    vocabulary = {piece: token for token, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, list(pairs), unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>")


@dataclass(frozen=True)
class Drawn:
    """A pair, and how its student parts bytes."""

    pair: TokenizerPair
    segment: Segment
    texts: list[str]


def naive_segment(side: Side, symbols: dict[str, str]) -> Segment:
    """Byte-pair encoding by hand; ``symbols`` are the characters of the text that have pieces."""
    tokenizer = json.loads(side.tokenizer.backend_tokenizer.to_str())["model"]
    pairs = [(a, b) for a, b in tokenizer["merges"]]
    ids = tokenizer["vocab"]

    @cache
    def segment(spelled: bytes) -> list[int] | None:
        parts: list[str] = []
        text = spelled.decode("utf-8", "surrogateescape")
        if "▁" in text and not side.spelling.byte_level:
            return None
        for character in text:
            if character in symbols:
                parts.append(symbols[character])
            elif side.spelling.byte_level:
                parts += [CHARACTER_OF[byte] for byte in character.encode("utf-8", "surrogateescape")]
            else:
                parts += [f"<0x{byte:02X}>" for byte in character.encode("utf-8", "surrogateescape")]
        return [ids[piece] for piece in merge(parts, pairs)] or None

    return segment


@st.composite
def drawn(draw: st.DrawFn) -> Drawn:
    """A byte-level teacher, a student of either kind, and texts."""
    teacher = byte_level(draw(BYTE_LEVEL_MERGES))
    if draw(st.booleans()):
        pair, symbols = make_pair(byte_level(draw(BYTE_LEVEL_MERGES)), teacher), {}
    else:
        pair, symbols = make_pair(sentencepiece(draw(SENTENCEPIECE_MERGES)), teacher), {" ": "▁", "a": "a", "b": "b"}
    return Drawn(pair, naive_segment(pair.student, symbols), draw(st.lists(TEXTS, min_size=1, max_size=4)))

"""A byte-fallback BPE in the style of Llama-2's SentencePiece model, learned from a text."""

from __future__ import annotations

import json
import string
from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

SPACE = "▁"
SPECIAL = ("<unk>", "<s>", "</s>")
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
PAD = "[PAD]"
# The chat format's markers are plain text to the tokenizer, yet stand in every message: each gets a piece of its own.
MARKERS = (f"{SPACE}<extra_id_0>", "<extra_id_1>")
ALPHABET = [SPACE, *string.digits, *string.ascii_letters, *string.punctuation]
# Words, runs of underscores and of punctuation, each with the space before it. Digits stay single: numbers are spelled.
WORD = rf"{SPACE}?_*\p{{L}}+|{SPACE}?_+|{SPACE}?[^{SPACE}_\p{{L}}\d\s]+|\d"
INDENTATION = rf"{SPACE}+(?={SPACE})|\s"

Merge = tuple[str, str]


def train_tokenizer(texts: Iterable[str], size: int) -> Tokenizer:
    """Learn the pieces inside words, and build the tokenizer that applies them to running text.

    Pieces are learned word by word, but the tokenizer has no pre-tokenizer, as Hymba's has none: no learned piece
    crosses a word's edge, so the same merges give the same pieces on a whole text.

    Args:
        texts: What to learn from.
        size: Tokens in all, with the bytes and the four special ones.

    Returns:
        A tokenizer with the ids in this order: ``<unk>``, ``<s>``, ``</s>``, 256 bytes, characters, pieces, ``[PAD]``.

    Raises:
        ValueError: If the texts are too short to fill ``size``.
    """
    merges = _learn_merges(texts, size)
    room = size - len(SPECIAL) - len(BYTES) - 1
    while True:
        # What comes after the learned merges applies only to what they left, and so changes nothing else.
        extra = [merge for marker in MARKERS for merge in _spell(marker, merges)] + _indentation_merges()
        pieces = dict.fromkeys([*ALPHABET, *map("".join, merges), *map("".join, extra)])
        if len(pieces) < room:
            raise ValueError(f"the texts give {len(pieces)} pieces; a vocabulary of {size} needs {room}")
        if len(pieces) == room:
            return _build([*SPECIAL, *BYTES, *pieces], [*merges, *extra])
        merges.pop()


def _learn_merges(texts: Iterable[str], size: int) -> list[Merge]:
    learner = Tokenizer(BPE())
    learner.normalizer = _normalizer()
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(INDENTATION), "removed"),
            pre_tokenizers.Split(Regex(WORD), "isolated"),
        ]
    )
    trainer = BpeTrainer(
        vocab_size=size,
        initial_alphabet=ALPHABET,
        limit_alphabet=len(ALPHABET),
        show_progress=False,
        max_token_length=16,
    )
    learner.train_from_iterator(texts, trainer)
    return [(left, right) for left, right in json.loads(learner.to_str())["model"]["merges"]]


def _spell(word: str, merges: list[Merge]) -> list[Merge]:
    """The merges that join, from left to right, what ``merges`` leave of a word."""
    model = BPE({piece: i for i, piece in enumerate(dict.fromkeys([*ALPHABET, *map("".join, merges)]))}, merges)
    first, *rest = [token.value for token in model.tokenize(word)]
    spelled = []
    for piece in rest:
        spelled.append((first, piece))
        first += piece
    return spelled


def _indentation_merges() -> list[Merge]:
    """Runs of two to eight spaces: doubled up first, then the odd rests joined."""
    lengths = [(1, 1), (2, 2), (4, 4), (2, 1), (4, 1), (4, 2), (4, 3)]
    return [(SPACE * left, SPACE * right) for left, right in lengths]


def _normalizer() -> normalizers.Normalizer:
    return normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])


def _build(pieces: list[str], merges: list[Merge]) -> Tokenizer:
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(BPE(vocabulary, merges, unk_token=SPECIAL[0], fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = _normalizer()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in (*SPECIAL, PAD)])
    return tokenizer

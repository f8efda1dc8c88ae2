"""What tokens spell is what their text was."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hymba_tune.distill.spelling import END, read_spelling
from hymba_tune.errors import DataError
from tests.distill.texts import TEXTS
from tests.distill.tokenizers import ALL, wordpiece

SPELLINGS = {name: read_spelling(tokenizer) for name, tokenizer in ALL.items()}


@pytest.mark.parametrize("name", ALL)
@settings(deadline=None)
@given(text=TEXTS)
def test_no_byte_is_lost_and_none_invented(name: str, text: str) -> None:
    ids = ALL[name](text, add_special_tokens=False)["input_ids"]
    prefix = " " if text and not SPELLINGS[name].byte_level else ""
    spelled = SPELLINGS[name].spell(ids).decode()
    # Unigram's Metaspace puts no space of its own where the text begins with one.
    assert spelled in ([text, prefix + text] if name == "unigram" else [prefix + text])


@pytest.mark.parametrize("name", ALL)
def test_every_token_has_its_length(name: str) -> None:
    spelling = SPELLINGS[name]
    assert spelling.lengths.tolist() == [len(token) for token in spelling.tokens]
    assert len(spelling) == len(ALL[name])


def test_byte_tokens_spell_bytes() -> None:
    tokenizer = ALL["hymba"]
    spelled = SPELLINGS["hymba"].tokens
    assert [spelled[tokenizer.get_vocab()[f"<0x{byte:02X}>"]] for byte in range(256)] == [
        bytes([byte]) for byte in range(256)
    ]


def test_special_tokens_spell_their_names() -> None:
    for name, token in [("hymba", "</s>"), ("llama3", "<|eot_id|>")]:
        assert SPELLINGS[name].tokens[ALL[name].convert_tokens_to_ids(token)] == token.encode()


def test_token_that_ends_a_turn_spells_the_end() -> None:
    end = ALL["hymba"].eos_token_id
    spelling = read_spelling(ALL["hymba"], {end})
    assert [token for token, spelled in enumerate(spelling.tokens) if spelled == END] == [end]


def plain(decoder: object, pre_tokenizer: object = None) -> PreTrainedTokenizerBase:
    tokenizer = Tokenizer(models.BPE({"a": 0, "Ġ": 1, "▁": 2, "é": 3}, []))
    if decoder:
        tokenizer.decoder = decoder
    if pre_tokenizer:
        tokenizer.pre_tokenizer = pre_tokenizer
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_without_a_decoder_the_pre_tokenizer_determines_spelling() -> None:
    byte_level = read_spelling(plain(None, pre_tokenizers.ByteLevel()))
    assert byte_level.tokens == (b"a", b" ", "▁".encode(), b"\xe9")  # ▁ is none of GPT-2's alphabet
    pieces = pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.Metaspace()])
    assert read_spelling(plain(None, pieces)).tokens == (b"a", "Ġ".encode(), b" ", "é".encode())


def test_ids_without_a_token_spell_nothing() -> None:
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 3}, []))
    tokenizer.decoder = decoders.ByteLevel()
    assert read_spelling(PreTrainedTokenizerFast(tokenizer_object=tokenizer)).tokens == (b"a", b"", b"", b"b")


def test_wordpiece_is_refused() -> None:
    with pytest.raises(DataError, match="cannot be aligned: its tokens omit the spaces"):
        read_spelling(wordpiece())


@pytest.mark.parametrize(
    ("decoder", "reason"),
    [
        (decoders.BPEDecoder(), "the white space after a word"),
        (decoders.Sequence([decoders.Fuse(), decoders.CTC()]), "spell sounds"),
        (None, "it has no decoder, so"),
    ],
)
def test_decoders_that_lose_bytes_are_refused(decoder: object, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        read_spelling(plain(decoder))


def test_marks_at_the_ends_of_words_are_refused() -> None:
    """As CLIP's, whose decoder does not show it."""
    tokenizer = Tokenizer(models.BPE({"a": 0, "a</w>": 1}, [], end_of_word_suffix="</w>"))
    tokenizer.decoder = decoders.ByteLevel()
    with pytest.raises(DataError, match="the white space after a word"):
        read_spelling(PreTrainedTokenizerFast(tokenizer_object=tokenizer))


def test_slow_tokenizer_is_refused() -> None:
    class Slow:
        is_fast = False
        name_or_path = "some/model"

    with pytest.raises(DataError, match="some/model is not a fast tokenizer"):
        read_spelling(Slow())  # type: ignore[arg-type]

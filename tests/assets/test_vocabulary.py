import re
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import hymba_tune.model  # noqa: F401  registers the configuration that AutoTokenizer looks up
from hymba_tune.assets import build_nano
from hymba_tune.assets.vocabulary import BYTES, INDENTATION, MARKERS, PAD, SPECIAL, WORD, train_tokenizer

PACKAGED = Tokenizer.from_file(str(build_nano.FOLDER / "tokenizer.json"))
SENTENCES = [sentence for text in topics.values() for sentence in re.split(r"\n|  +", text)]


@pytest.fixture(scope="module", params=["packaged", "trained"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return PACKAGED if request.param == "packaged" else train_tokenizer(topics.values(), 1500)


# The format has no way to write the space symbol itself, and special tokens are not text.
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁")) | st.text("ab <0x>_\n\t\r\0é🙂{}1"))
def test_any_text_comes_back(text: str) -> None:
    assert PACKAGED.decode(PACKAGED.encode(text).ids) == text


@pytest.mark.parametrize(
    "text", ["", " ", "  two", "\tx\r\n", "naïve 🙂👩‍👩‍👧", "<0x41>", "a  b   c", "\x00", "한국어"]
)
def test_unusual_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_ids_are_laid_out_as_in_llama(tokenizer: Tokenizer) -> None:
    size = tokenizer.get_vocab_size()
    first = [tokenizer.id_to_token(i) for i in range(3 + 256)]
    assert first == [*SPECIAL, *BYTES]
    assert tokenizer.token_to_id(PAD) == size - 1
    assert list(tokenizer.get_added_tokens_decoder()) == [0, 1, 2, size - 1]


def test_no_learned_piece_crosses_the_edge_of_a_word(tokenizer: Tokenizer) -> None:
    words = pre_tokenizers.Split(Regex(WORD), "isolated")
    for piece in set(tokenizer.get_vocab()) - {*SPECIAL, *BYTES, PAD}:
        in_marker = any(marker.startswith(piece) for marker in MARKERS)
        assert in_marker or set(piece) == {"▁"} or len(words.pre_tokenize_str(piece)) == 1


def test_running_text_is_cut_as_its_words_are(tokenizer: Tokenizer) -> None:
    wordwise = Tokenizer.from_str(tokenizer.to_str())
    wordwise.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(INDENTATION), "isolated"), pre_tokenizers.Split(Regex(WORD), "isolated")]
    )
    for sentence in SENTENCES:
        assert tokenizer.encode(sentence).tokens == wordwise.encode(sentence).tokens


def test_digits_and_line_ends_stay_single(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("\n2048\n").tokens == ["<s>", "▁", "<0x0A>", "2", "0", "4", "8", "<0x0A>"]
    assert not [
        piece for piece in tokenizer.get_vocab() if re.search(r"\d", piece) and not re.search(r"^▁?<|^\d$", piece)
    ]


def test_chat_markers_are_one_token_each(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("<extra_id_0>System\n\n<extra_id_1>User\n").tokens
    assert tokens[1] == "▁<extra_id_0>"
    assert tokens.count("<extra_id_1>") == 1


@pytest.mark.parametrize("spaces", range(1, 17))
def test_indentation_is_one_token_for_every_eight_spaces(tokenizer: Tokenizer, spaces: int) -> None:
    tokens = tokenizer.encode("x\n" + " " * spaces + "\n").tokens
    assert tokens[3:-1] == ["▁" * 8] * (spaces // 8) + ["▁" * (spaces % 8)] * (spaces % 8 > 0)


def test_packaged_size_is_the_models() -> None:
    assert PACKAGED.get_vocab_size() == build_nano.VOCABULARY


def test_too_little_text_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the texts give \d+ pieces; a vocabulary of 4096 needs 3836"):
        train_tokenizer(["only a few words"], 4096)


@pytest.mark.parametrize("load", [AutoTokenizer.from_pretrained, PreTrainedTokenizerFast.from_pretrained])
def test_transformers_gives_the_files_own_ids_before_and_after_saving(load: type, tmp_path: Path) -> None:
    loaded = load(build_nano.FOLDER)
    loaded.save_pretrained(tmp_path)
    for tokenizer in loaded, load(tmp_path):
        for text in [*SENTENCES[::20], "  x", "a</s>b", "<s>a", ""]:
            assert tokenizer(text).input_ids == PACKAGED.encode(text).ids
        specials = tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
        assert specials == (0, 1, 2, build_nano.VOCABULARY - 1)
        assert tokenizer.padding_side == "left"

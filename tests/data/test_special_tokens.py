"""Special tokens written inside texts are counted and named, and can be written as plain text."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from hymba_tune.config import SFTConfig
from hymba_tune.data import Conversation, Message, Text, build_dataset, build_preferences, encode, open_sources
from hymba_tune.data.checking import check_sources
from hymba_tune.data.formats import Example
from hymba_tune.data.mixes import escaped
from hymba_tune.data.special_tokens import SpecialTokens
from hymba_tune.data.training import opened
from tests.data.inputs import source
from tests.data.small_tokenizers import sentencepiece_like, turns

ROWS: list[dict[str, Any]] = [
    {"prompt": "what does </s> mean in <s> text? <|im_end|>", "completion": "It ends </s> a text"},
    {"prompt": "a", "completion": "b</s>"},
    {"prompt": "a", "completion": "<extra_id_1>User\nignore"},
    {"text": "<s>Once </s> upon a time</s>"},
]
PAIR = {"prompt": "a", "chosen": "b </s> c", "rejected": "d"}


def test_they_are_counted_and_named(hymba: PreTrainedTokenizerFast) -> None:
    result = check_sources([source(ROWS)], hymba, max_length=256)
    assert {note.what: note.rows for note in result.notes.values()} == {
        "its text contains </s>, which the model reads as a special token": 2,
        "its text contains <s>, which the model reads as a special token": 1,
        "its text contains <extra_id_1>, which the model reads as a special token": 1,
    }
    assert {note.fix for note in result.notes.values()} == {"--escape-special-tokens, or remove it"}
    assert check_sources([source([PAIR])], hymba, max_length=256).notes
    assert not check_sources([escaped(source([*ROWS, PAIR]))], hymba, max_length=256).notes


def test_a_run_counts_the_rows_that_have_them(hymba: PreTrainedTokenizerFast) -> None:
    _, report = build_dataset([source(ROWS)], hymba, max_length=256)
    assert report.special == 3
    _, report = build_dataset([escaped(source(ROWS))], hymba, max_length=256)
    assert report.special == 0


def ends(rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerFast, *, escape: bool) -> list[int]:
    """The number of end tokens of each encoded row."""
    read = escaped(source(rows)) if escape else source(rows)
    data, _ = build_dataset([read], tokenizer, max_length=256)
    return [ids.count(tokenizer.eos_token_id) for ids in data["input_ids"]]


def test_escaped_rows_have_the_end_tokens_of_their_answers_only(hymba: PreTrainedTokenizerFast) -> None:
    assert ends(ROWS, hymba, escape=False) == [3, 1, 1, 2]
    assert ends(ROWS, hymba, escape=True) == [1, 1, 1, 1]
    data, _ = build_preferences([escaped(source([PAIR]))], hymba, paired=True, max_length=256)
    assert data[0]["chosen_ids"].count(hymba.eos_token_id) == 1


@settings(max_examples=30, deadline=None)
@given(
    pieces=st.lists(st.sampled_from(["</s>", "<s>", "<unk>", "<extra_id_1>", " ", "a", "<", "</", "s>"]), min_size=1)
)
def test_no_special_token_is_left(hymba: PreTrainedTokenizerFast, pieces: list[str]) -> None:
    special = SpecialTokens.of(hymba)
    text = "".join(pieces)
    examples: list[Example] = [Text(text), Conversation(turns(text, f"x {text} x"), contexts=(text,))]
    for example in examples:
        once = special.escape(example)
        assert special.find(once) == []
        assert special.escape(once) == once
        for row in encode(once, hymba, 10_000):
            assert row.input_ids.count(hymba.eos_token_id) == 1 or isinstance(example, Text)


def test_own_end_of_an_answer_stays(hymba: PreTrainedTokenizerFast) -> None:
    special = SpecialTokens.of(hymba)
    example = Conversation((Message("user", "a</s>"), Message("assistant", "b</s> c</s>")))
    assert special.escape(example) == Conversation((Message("user", "a< /s>"), Message("assistant", "b< /s> c</s>")))


def test_template_that_renders_nothing_has_no_markers() -> None:
    tokenizer = sentencepiece_like("{{ raise_exception('never') }}")
    assert SpecialTokens.of(tokenizer).find(Text("a <extra_id_1> </s> b")) == ["</s>"]


def test_setting_reaches_every_source_of_a_run() -> None:
    config = SFTConfig(data=["demo"], escape_special_tokens=True)
    assert [one.escape for sources in opened(config) for one in sources] == [True, True]
    assert [one.escape for one in open_sources(["demo"])] == [False]


@pytest.mark.parametrize("row", ROWS)
def test_nothing_else_changes(row: dict[str, Any], hymba: PreTrainedTokenizerFast) -> None:
    plain = {key: value.replace("</s>", "").replace("<s>", "") for key, value in row.items()}
    plain = {key: value.replace("<extra_id_1>", "") for key, value in plain.items()}
    one, other = (
        build_dataset([read], hymba, max_length=256)[1] for read in (source([plain]), escaped(source([plain])))
    )
    assert one.fingerprint == other.fingerprint

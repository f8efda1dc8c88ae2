from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from hymba_tune.data import HYMBA_TEMPLATE, Conversation, Message, encode, render_prompt, with_chat_template
from hymba_tune.data.templates import NAMED
from hymba_tune.errors import ConfigError, DataError
from tests.data.small_tokenizers import CHATML, MISTRAL, sentencepiece_like, turns

TALK = Conversation(turns("Hi", "Hello", "Bye", "So long", system="Be brief."))


@pytest.mark.parametrize("name", NAMED)
def test_named_template_is_set_whatever_the_tokenizer_had(name: str) -> None:
    tokenizer = sentencepiece_like(MISTRAL)
    taken = with_chat_template(tokenizer, name)
    assert (taken.chat_template, tokenizer.chat_template) == (NAMED[name], MISTRAL)
    (row,) = encode(TALK, taken, 10_000)
    assert row.labels.count(taken.eos_token_id) == 2
    assert row.input_ids.count(taken.bos_token_id) == 1


def test_alpaca_writes_its_headings() -> None:
    prompt = render_prompt(Conversation(TALK.messages[:4]), with_chat_template(sentencepiece_like(None), "alpaca"))
    assert prompt == (
        "<s>Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello</s>\n\n### Instruction:\nBye\n\n### Response:\n"
    )


@pytest.mark.parametrize(
    "conversation",
    [Conversation((*TALK.messages, Message("tool", "3"))), Conversation(TALK.messages, tools=({"name": "add"},))],
)
def test_alpaca_refuses_what_it_cannot_show(conversation: Conversation) -> None:
    with pytest.raises(DataError, match=r"the chat template refuses the conversation \(alpaca"):
        encode(conversation, with_chat_template(sentencepiece_like(None), "alpaca"), 10_000)


def test_template_of_a_file_survives_saving(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text(CHATML)
    taken = with_chat_template(sentencepiece_like(HYMBA_TEMPLATE), str(tmp_path / "mine.jinja"))
    taken.save_pretrained(tmp_path / "saved")
    again = with_chat_template(PreTrainedTokenizerFast.from_pretrained(tmp_path / "saved"))
    assert again.chat_template == CHATML
    assert encode(TALK, again, 10_000) == encode(TALK, taken, 10_000)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"mine\.jinja cannot be read: No such file(.|\n)*one of hymba, alpaca, or a file of Jinja"),
        (b"\xff", "it is not UTF-8"),
        (b"{% for message in messages %}", "the chat template refuses the conversation .Unexpected end of template"),
        (b"{{ messages[0].content + 1 }}", "refuses the conversation .can only concatenate"),
        (b"{{ messages[0].content }}", "rewrites the conversation around message 2, an answer"),
    ],
)
def test_file_that_is_no_template_is_refused(content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "mine.jinja").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        with_chat_template(sentencepiece_like(None), str(tmp_path / "mine.jinja"))

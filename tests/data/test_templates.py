from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from hymba_tune.data import HYMBA_TEMPLATE, Conversation, Message, encode, render_prompt, with_chat_template
from hymba_tune.data.templates import NAMED
from hymba_tune.errors import ConfigError, DataError
from tests.data.small_tokenizers import CHATML, MISTRAL, sentencepiece_like, turns

CONVERSATION = Conversation(turns("Hi", "Hello", "Bye", "So long", system="Be brief."))


@pytest.mark.parametrize("name", NAMED)
def test_named_template_replaces_the_tokenizers_own(name: str) -> None:
    tokenizer = sentencepiece_like(MISTRAL)
    changed = with_chat_template(tokenizer, name)
    assert (changed.chat_template, tokenizer.chat_template) == (NAMED[name], MISTRAL)
    (row,) = encode(CONVERSATION, changed, 10_000)
    assert row.labels.count(changed.eos_token_id) == 2
    assert row.input_ids.count(changed.bos_token_id) == 1


def test_alpaca_writes_its_headings() -> None:
    prompt = render_prompt(
        Conversation(CONVERSATION.messages[:4]), with_chat_template(sentencepiece_like(None), "alpaca")
    )
    assert prompt == (
        "<s>Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello</s>\n\n### Instruction:\nBye\n\n### Response:\n"
    )


@pytest.mark.parametrize(
    "conversation",
    [
        Conversation((*CONVERSATION.messages, Message("tool", "3"))),
        Conversation(CONVERSATION.messages, tools=({"name": "add"},)),
    ],
)
def test_alpaca_refuses_what_it_cannot_show(conversation: Conversation) -> None:
    with pytest.raises(DataError, match=r"the chat template refuses the conversation \(alpaca"):
        encode(conversation, with_chat_template(sentencepiece_like(None), "alpaca"), 10_000)


def test_template_of_a_file_survives_saving(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text(CHATML)
    changed = with_chat_template(sentencepiece_like(HYMBA_TEMPLATE), str(tmp_path / "mine.jinja"))
    changed.save_pretrained(tmp_path / "saved")
    again = with_chat_template(PreTrainedTokenizerFast.from_pretrained(tmp_path / "saved"))
    assert again.chat_template == CHATML
    assert encode(CONVERSATION, again, 10_000) == encode(CONVERSATION, changed, 10_000)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"mine\.jinja cannot be read: No such file(.|\n)*one of hymba, alpaca, or a Jinja file"),
        (b"\xff", "it is not UTF-8"),
        (
            b"{% for message in messages %}",
            "the chat template refuses the conversation .line 1: Unexpected end of template",
        ),
        (b"{{ messages[0].content + 1 }}", "refuses the conversation .TypeError: can only concatenate"),
        (b"{{ messages[0].content }}", "rewrites the conversation around message 2, an answer"),
    ],
)
def test_file_that_is_not_a_template_is_refused(content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "mine.jinja").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        with_chat_template(sentencepiece_like(None), str(tmp_path / "mine.jinja"))

"""The corrected chat template of Hymba against the released one."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from hymba_tune.data import (
    HYMBA_TEMPLATE,
    Conversation,
    Message,
    encode,
    encode_prompt,
    render_prompt,
    with_chat_template,
)
from tests.data.small_tokenizers import CHATML, MISTRAL, sentencepiece_like, turns

ENOUGH = 100_000
TALK = turns("What is 6 times 7?", "  The answer\n\nis 42. ", "Sure?", "Yes: <42>, 漢字 😀", system="Be brief.")


class TestHymbaTemplate:
    """The corrected template against the released one."""

    full = Conversation(
        (*TALK[:2], Message("tool", " {} "), *TALK[2:], Message("user", "x")),
        tools=({"name": "add", "description": "<é>", "parameters": {"a": 1}}, {"name": "b"}),
        contexts=("one ", " two"),
    )

    @pytest.mark.parametrize("tools", [0, 1, 2])
    @pytest.mark.parametrize("contexts", [0, 1, 2])
    @pytest.mark.parametrize("first_message", [0, 1])
    def test_renders_as_the_released_template(
        self, released: PreTrainedTokenizerFast, tools: int, contexts: int, first_message: int
    ) -> None:
        arguments = {
            "conversation": [{"role": m.role, "content": m.content} for m in self.full.messages[first_message:]],
            "tools": list(self.full.tools[:tools]) or None,
            "contexts": list(self.full.contexts[:contexts]) or None,
            "add_generation_prompt": True,
            "tokenize": False,
        }
        corrected = with_chat_template(released).apply_chat_template(**arguments)
        assert corrected.count("<s>") == 1
        assert corrected.count("</s>") == 2
        assert corrected.replace("<s>", "").replace("</s>", "") == released.apply_chat_template(**arguments)

    def test_encodes_as_the_released_template_with_end_of_sequence_added(
        self, released: PreTrainedTokenizerFast
    ) -> None:
        assert encode(self.full, released, ENOUGH) == encode(self.full, with_chat_template(released), ENOUGH)

    def test_begins_with_the_ids_of_the_released_tokenizer(self, released: PreTrainedTokenizerFast) -> None:
        prompt = Conversation(turns("Hi"))
        assert (
            encode_prompt(prompt, with_chat_template(released)) == released(render_prompt(prompt, released)).input_ids
        )

    def test_replaces_the_released_template_and_survives_saving(
        self, released: PreTrainedTokenizerFast, tmp_path: Path
    ) -> None:
        before = released.chat_template
        corrected = with_chat_template(released)
        assert (corrected.chat_template, released.chat_template) == (HYMBA_TEMPLATE, before)
        corrected.save_pretrained(tmp_path)
        again = PreTrainedTokenizerFast.from_pretrained(tmp_path)
        assert encode(self.full, again, ENOUGH) == encode(self.full, corrected, ENOUGH)

    def test_is_set_on_a_tokenizer_without_a_template(self) -> None:
        assert with_chat_template(sentencepiece_like(None)).chat_template == HYMBA_TEMPLATE

    @pytest.mark.parametrize("template", [CHATML, MISTRAL, HYMBA_TEMPLATE, "{{ raise_exception('never') }}"])
    def test_other_templates_are_kept(self, template: str) -> None:
        tokenizer = sentencepiece_like(template)
        assert with_chat_template(tokenizer) is tokenizer

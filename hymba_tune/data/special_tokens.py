"""Special tokens written inside texts: the model reads them as the real ones, and an answer ends at its end token."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hymba_tune.data.chat import render_prompt
from hymba_tune.data.formats import Conversation, Example
from hymba_tune.data.messages import Message
from hymba_tune.errors import DataError

if TYPE_CHECKING:  # importing transformers imports torch
    from transformers import PreTrainedTokenizerBase

QUESTION = "\ue000question\ue000"
MARKER = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]+\]")
"""What a chat template may begin a turn with, in angle or square brackets."""


@dataclass(frozen=True)
class SpecialTokens:
    """The special tokens of a tokenizer, and the markers of turns of its chat template.

    Attributes:
        begin: The beginning-of-sequence token, which may begin a plain text; may be empty.
        end: The end-of-sequence token, which may end an answer or a plain text.
        pattern: Matches any of the tokens and markers; `None` if there are none.
    """

    begin: str
    end: str
    pattern: re.Pattern[str] | None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> SpecialTokens:
        """Find those of a tokenizer with a chat template."""
        tokens = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        tokens |= {*tokenizer.all_special_tokens, *_markers(tokenizer)}
        longest_first = sorted((token for token in tokens if len(token) > 1), key=len, reverse=True)
        pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
        return cls(tokenizer.bos_token or "", tokenizer.eos_token or "", pattern)

    def find(self, example: Example) -> list[str]:
        """Return those inside the texts of an example, in the order of their first occurrence.

        The end token at the very end of an answer is where it belongs.
        """
        if self.pattern is None:
            return []
        found = (self.pattern.findall(text) for text in self._texts(example))
        return [*dict.fromkeys(token for tokens in found for token in tokens)]

    def escape(self, example: Example) -> Example:
        """Write those inside the texts of an example with a space, which makes them plain text: ``< /s>``."""
        if isinstance(example, Conversation):
            return self.escape_conversation(example)
        if not self.find(example):
            return example
        body = example.text.removeprefix(self.begin)
        return replace(example, text=example.text[: -len(body)] + self._escaped(body, ends=True))

    def escape_conversation(self, conversation: Conversation) -> Conversation:
        """Do as `escape`; the end token at the end of an answer stays."""
        if not self.find(conversation):
            return conversation
        messages = [
            replace(message, content=self._escaped(message.content, ends=message.role == "assistant"))
            for message in conversation.messages
        ]
        contexts = tuple(map(self._escaped, conversation.contexts))
        return replace(conversation, messages=tuple(messages), contexts=contexts)

    def _escaped(self, text: str, *, ends: bool = False) -> str:
        assert self.pattern is not None
        body = self._without_end(text) if ends else text
        return self.pattern.sub(lambda match: f"{match[0][0]} {match[0][1:]}", body) + text[len(body) :]

    def _texts(self, example: Example) -> Iterable[str]:
        if not isinstance(example, Conversation):
            return [self._without_end(example.text.removeprefix(self.begin))]
        answers = ("assistant",)
        contents = (self._without_end(m.content) if m.role in answers else m.content for m in example.messages)
        return [*contents, *example.contexts]

    def _without_end(self, text: str) -> str:
        return text.rstrip().removesuffix(self.end) if self.end else text


def _markers(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return what the chat template writes in brackets before a question; nothing if it cannot render one."""
    try:
        text = render_prompt(Conversation((Message("user", QUESTION),)), tokenizer)
    except DataError:
        return []
    return MARKER.findall(text.partition(QUESTION)[0])

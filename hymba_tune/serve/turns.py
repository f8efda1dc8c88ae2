"""Where the turns of a chat begin in its text: chats that begin alike differ from there on."""

from __future__ import annotations

from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from hymba_tune.data.rendering import apply_template

QUESTION, ANSWER = "\ue000question\ue000", "\ue000answer\ue000"


@dataclass(frozen=True)
class Turns:
    """What a chat template writes in front of messages.

    Attributes:
        question: What is in front of a user's message; empty if it is not known.
        answer: What is in front of an answer; empty if it is not known.
    """

    question: str = ""
    answer: str = ""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Turns:
        """Find them by rendering a conversation."""
        turns = [("user", QUESTION), ("assistant", ANSWER), ("user", QUESTION)]
        messages = [{"role": role, "content": content} for role, content in turns]
        try:
            text = apply_template(tokenizer, messages)
            asked = apply_template(tokenizer, messages, add_generation_prompt=True)
        except TemplateError:
            return cls()
        before = text.rpartition(QUESTION)[0].rpartition(ANSWER)[2]
        before = before.rpartition(str(tokenizer.eos_token))[2]
        return cls(before.strip(), asked.removeprefix(text) if asked.startswith(text) else "")

    def cuts(self, text: str) -> list[int]:
        """The end of what comes before the first question, such as a system prompt, and the starts of all answers.

        Args:
            text: A rendered conversation, up to an answer.

        Returns:
            Offsets in characters, ascending.
        """
        places = {text.find(self.question)} if self.question else set()
        place = text.find(self.answer) if self.answer else -1
        while place >= 0:
            places.add(place + len(self.answer))
            place = text.find(self.answer, place + 1)
        return sorted(place for place in places if 0 < place < len(text))

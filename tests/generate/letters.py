"""Prompts of random tokens, and a tokenizer for them."""

from __future__ import annotations

from tests.tiny import random_texts

PROMPTS = [text.tolist() for text in random_texts([9, 1, 30, 4, 12])]
END = 1


class Letters:
    """A tokenizer whose tokens are letters; decoding adds no space before a text."""

    eos_token_id = END

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(chr(ord("A") + i) for i in ids if i != END or not skip_special_tokens)

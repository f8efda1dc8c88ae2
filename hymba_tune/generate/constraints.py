"""Texts that must have a form: JSON of a schema, or whatever a grammar describes, by llguidance."""

from __future__ import annotations

import json
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from hymba_tune.errors import DataError

JSON_SPACES = {"whitespace_pattern": r"[ \n]{0,16}"}
"""White space inside JSON is limited: a model that repeats itself would write nothing else."""


class Constraint:
    """What one text must be, and how much of it is written.

    Args:
        matcher: An ``LLMatcher`` of llguidance, which is advanced.
    """

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def copy(self) -> Constraint:
        """A constraint for another text, in the same state."""
        return Constraint(self._matcher.deep_copy())

    @property
    def complete(self) -> bool:
        """Whether the text is complete and nothing can follow."""
        return bool(self._matcher.is_stopped())

    def allowed(self) -> bytes:
        """One bit for each token of the tokenizer, the lowest of a byte first: whether the token can come next.

        Raises:
            DataError: If the grammar needs more computation than its limits allow.
        """
        bits = bytes(self._matcher.compute_bitmask())
        self._check()
        return bits

    def accept(self, token: int) -> None:
        """Advance by a token of the text.

        Raises:
            DataError: If the token cannot come next.
        """
        self._matcher.consume_token(token)
        self._check()

    def skip(self, ids: list[int]) -> bool:
        """Advance by the tokens of text that exists already; returns whether all of them fit."""
        return bool(self._matcher.try_consume_tokens(ids) == len(ids))

    def _check(self) -> None:
        if self._matcher.is_error():
            raise DataError(f"The text cannot follow its grammar: {_first_line(self._matcher.get_error())}")


class Grammars:
    """Compiles grammars for a tokenizer.

    Args:
        tokenizer: A fast tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def lark(self, grammar: str) -> Constraint:
        """A text of a grammar in llguidance's variant of Lark.

        Raises:
            DataError: If the grammar is not valid.
        """
        from llguidance import LLMatcher

        matcher = LLMatcher(self._compiled, LLMatcher.grammar_from_lark(grammar), log_level=0)
        if matcher.is_error():
            raise DataError(_first_line(matcher.get_error()))
        return Constraint(matcher)

    def tokens(self, text: str) -> list[int]:
        """Tokens that spell a text, with nothing before it."""
        return list(self._compiled.greedy_tokenize(text))

    @cached_property
    def _compiled(self) -> Any:
        """The tokenizer as llguidance reads it, which takes a second for a large vocabulary."""
        from llguidance.hf import from_tokenizer  # installed by the extra "serve"

        return from_tokenizer(self._tokenizer)


def json_rule(schema: dict[str, Any], *, lenient: bool = False) -> str:
    """A rule of a Lark grammar for JSON of a schema, with limited white space.

    Args:
        schema: The JSON schema.
        lenient: Whether keywords that cannot be enforced are ignored, instead of an error of the grammar.

    Raises:
        DataError: If the schema is nested too deeply.
    """
    try:
        return f"%json {json.dumps({**schema, 'x-guidance': {**JSON_SPACES, 'lenient': lenient}})}"
    except RecursionError:
        raise DataError("the schema is nested too deeply") from None


def _first_line(message: str) -> str:
    return message.strip().partition("\n")[0]

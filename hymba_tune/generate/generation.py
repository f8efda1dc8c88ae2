"""A text that is generated: its prompt, what is wanted, and its tokens so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from transformers import PreTrainedTokenizerBase

from hymba_tune.generate.constraints import Constraint
from hymba_tune.generate.sampling import Sampling, TokenScore


@dataclass(eq=False)
class Generation:
    """A prompt and the tokens generated for it so far.

    Attributes:
        prompt: The prompt's token ids, at least one.
        max_new_tokens: Maximum number of new tokens.
        sampling: How the next token is chosen.
        stop: Stop strings; generation ends before the first one that appears.
        stop_ids: Tokens that end the text as the end token does.
        constraint: What the text must be, such as JSON of a schema; None for any text.
        continues_prompt: Whether the text continues the prompt's text, including the space between the two. False
            decodes it as a text of its own.
        top: How many of the likeliest tokens to record at each position. None records no scores at all.
        cuts: Where prompts with the same beginning may differ, in tokens: the end of a system prompt, the beginnings
            of earlier answers. See `ChunkedDecoder`.
        number: The caller's index for this generation.
        reused: The number of prompt tokens whose state was reused.
        ids: The generated token ids, including the end token.
        scores: The recorded score of each generated token.
        finish_reason: "stop" after the end token or a stop string, "length" at ``max_new_tokens``, "error" after an
            error, None until then.
        error: The error that ended this generation; the others of its batch continue.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()
    constraint: Constraint | None = None
    continues_prompt: bool = False
    top: int | None = None
    cuts: tuple[int, ...] = ()
    number: int = 0
    reused: int = 0
    ids: list[int] = field(default_factory=list)
    scores: list[TokenScore] = field(default_factory=list)
    finish_reason: Literal["stop", "length", "error"] | None = None
    error: Exception | None = None

    def fail(self, error: Exception) -> None:
        """End this generation with an error."""
        self.error = error
        self.finish_reason = "error"

    def text(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """The generated text so far, cut before the first stop string."""
        text = self.full_text(tokenizer)
        return text[: min((place for stop in self.stop if (place := text.find(stop)) >= 0), default=len(text))]

    def full_text(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """The generated text so far, including any stop string."""
        prefix = list(self.prompt[-CONTEXT:]) if self.continues_prompt else []
        skip = len(tokenizer.decode(prefix, skip_special_tokens=True)) if prefix else 0
        ids = self.ids[:-1] if self.ids and self.ids[-1] in self.stop_ids else self.ids
        return str(tokenizer.decode(prefix + ids, skip_special_tokens=True))[skip:]


CONTEXT = 8
"""Number of prompt tokens that are decoded together with a continuation."""

"""The end token of answers, which a chat template writes and which may differ from the tokenizer's own."""

from __future__ import annotations

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from hymba_tune.data.rendering import apply_template
from hymba_tune.errors import ConfigError

FLAG = "--teacher-end"
QUESTIONS = ("alpha?", "beta?")
ANSWERS = ("gamma!", "delta!")
"""The questions and answers of the conversation that a chat template is tried on."""


def tokens_after_answers(tokenizer: PreTrainedTokenizerBase) -> tuple[str | None, str | None]:
    """Render a conversation, and find the tokens after its answers.

    Args:
        tokenizer: A tokenizer with a chat template.

    Returns:
        The added token right after the first answer, and after the last; None where there is none, or where the
        template refuses the conversation.
    """
    turns = zip(("user", "assistant") * 2, (QUESTIONS[0], ANSWERS[0], QUESTIONS[1], ANSWERS[1]), strict=True)
    messages = [{"role": role, "content": content} for role, content in turns]
    try:
        text = apply_template(tokenizer, messages)
    except TemplateError:
        return None, None
    if not all(content in text for content in (*QUESTIONS, *ANSWERS)):
        return None, None
    middle = text.partition(ANSWERS[0])[2].partition(QUESTIONS[1])[0]
    return _token_at_start(middle, tokenizer), _token_at_start(text.rpartition(ANSWERS[1])[2], tokenizer)


def _token_at_start(text: str, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the longest added token that a text begins with, after white space."""
    text = text.lstrip()
    return max((token for token in tokenizer.get_added_vocab() if text.startswith(token)), key=len, default=None)


def find_end(tokenizer: PreTrainedTokenizerBase) -> str:
    """Find the token that a teacher's chat template ends every answer with.

    A token that follows some answers only may belong to the next message instead. The tokenizer's end-of-sequence token
    cannot, and counts.

    Args:
        tokenizer: A tokenizer with a chat template.

    Raises:
        ConfigError: If there is no such token, or more than one.
    """
    middle, last = tokens_after_answers(tokenizer)
    candidates = {middle, last} - {None}
    if len(candidates) == 1 and (middle == last or tokenizer.eos_token in candidates):
        return str(candidates.pop())
    behavior = (
        "writes no special token after an answer, or refuses a conversation of two questions"
        if not candidates
        else f"writes {middle or 'no special token'} after an answer within a conversation, and "
        f"{last or 'no special token'} after the last one"
    )
    raise ConfigError(
        f"The teacher's chat template {behavior}: the token that ends its answers is unknown.",
        expected="one special token after every answer",
        fix=f"{FLAG} TOKEN, the one that the teacher was trained to end an answer with"
        + (f": often {tokenizer.eos_token}" if tokenizer.eos_token else ""),
    )

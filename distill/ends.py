"""The token that ends an answer: the one that a chat template writes there, which need not be the tokenizer's own."""

from __future__ import annotations

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from hymba_tune.errors import ConfigError

FLAG = "--teacher-end"
ASKED, ANSWERED = ("alpha?", "beta?"), ("gamma!", "delta!")
"""The questions and answers of the conversation that a chat template is tried on."""


def tokens_after_answers(tokenizer: PreTrainedTokenizerBase) -> tuple[str | None, str | None]:
    """Render a conversation, and look at what follows its answers.

    Args:
        tokenizer: With a chat template.

    Returns:
        The added token right after the first answer, and after the last; None where there is none, or where the
        template refuses the conversation.
    """
    turns = zip(("user", "assistant") * 2, (ASKED[0], ANSWERED[0], ASKED[1], ANSWERED[1]), strict=True)
    messages = [{"role": role, "content": content} for role, content in turns]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except (TemplateError, TypeError):
        return None, None
    if not all(said in text for said in (*ASKED, *ANSWERED)):
        return None, None
    middle = text.partition(ANSWERED[0])[2].partition(ASKED[1])[0]
    return _token_at_start(middle, tokenizer), _token_at_start(text.rpartition(ANSWERED[1])[2], tokenizer)


def _token_at_start(text: str, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The longest added token that a text begins with, after white space."""
    text = text.lstrip()
    return max((token for token in tokenizer.get_added_vocab() if text.startswith(token)), key=len, default=None)


def find_end(tokenizer: PreTrainedTokenizerBase) -> str:
    """Find the token that a teacher's chat template ends every answer with.

    A token that follows some answers only may belong to the next message instead. The tokenizer's end-of-sequence token
    cannot, and counts.

    Args:
        tokenizer: With a chat template.

    Raises:
        ConfigError: If there is no such token, or more than one.
    """
    middle, last = tokens_after_answers(tokenizer)
    found = {middle, last} - {None}
    if len(found) == 1 and (middle == last or tokenizer.eos_token in found):
        return str(found.pop())
    said = (
        "writes no special token after an answer, or refuses a conversation of two questions"
        if not found
        else f"writes {middle or 'no special token'} after an answer within a conversation, and "
        f"{last or 'no special token'} after the last one"
    )
    raise ConfigError(
        f"The teacher's chat template {said}: the token that ends its answers cannot be told.",
        expected="one special token after every answer",
        fix=f"{FLAG} TOKEN, the one that the teacher was trained to end an answer with"
        + (f": often {tokenizer.eos_token}" if tokenizer.eos_token else ""),
    )

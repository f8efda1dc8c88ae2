"""Answers from a model: one conversation in, its next answer out, as it is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import BaseStreamer

from hymba_tune.data import Conversation, encode_prompt


class _Passing(BaseStreamer):
    """Hands every finished piece of text on."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None]) -> None:
        self._tokenizer, self._on_text = tokenizer, on_text
        self._ids: list[int] | None = None
        self._passed = 0

    def put(self, value: Tensor) -> None:
        """Take the prompt, which comes first, or a token."""
        if self._ids is None:
            self._ids = []
            return
        self._ids += value.tolist()
        # White space may turn out to be the answer's end, and a character that lacks bytes be another one.
        self._pass(_decode(self._tokenizer, self._ids).rstrip("\ufffd").rstrip())

    def end(self) -> None:
        """Pass on what was held back."""
        self._pass(_decode(self._tokenizer, self._ids or []))

    def _pass(self, text: str) -> None:
        if piece := text[self._passed :]:
            self._on_text(piece)
            self._passed = len(text)


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The text of a whole answer: decoded in parts, each would lose the space that it begins with."""
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversation: Conversation,
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float = 1.0,
    on_text: Callable[[str], None] | None = None,
) -> str:
    """Write the assistant's next answer.

    Args:
        model: In any mode; it is left as it was.
        tokenizer: With a chat template.
        conversation: Its last message is not the assistant's.
        max_new_tokens: Tokens the answer may have.
        temperature: 0 takes the likeliest token each time.
        top_p: Sample from the likeliest tokens that together have this probability.
        on_text: Called with each piece of the answer as it is written.

    Returns:
        The answer, without the token that ends it.
    """
    ids = torch.tensor([encode_prompt(conversation, tokenizer)], device=model.device)
    written = _generate(
        model,
        ids,
        torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        streamer=_Passing(tokenizer, on_text) if on_text else None,
    )
    return _decode(tokenizer, written[0].tolist())


def write(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    ends: Sequence[int],
    max_new_tokens: int,
    temperature: float,
) -> list[list[int]]:
    """Go on with several prompts at once.

    Args:
        model: In any mode; it is left as it was.
        prompts: Token ids.
        ends: The tokens that end an answer, at least one.
        max_new_tokens: Tokens that an answer may have.
        temperature: 0 takes the likeliest token each time.

    Returns:
        The tokens written; the last one is of ``ends``, unless an answer became too long.
    """
    width = max(map(len, prompts))
    padded = torch.tensor([[ends[0]] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    written = _generate(
        model,
        padded,
        mask,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        eos_token_id=list(ends),
        pad_token_id=ends[0],
    )
    return [_up_to(ends, ids) for ids in written.tolist()]


def _generate(
    model: PreTrainedModel, ids: Tensor, mask: Tensor, *, temperature: float, top_p: float = 1.0, **settings: Any
) -> Tensor:
    """What transformers writes behind some prompts of one length; the model is left in the mode it was in."""
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature:
        # Left to itself, transformers samples from the 50 likeliest tokens only.
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    training = model.training
    model.eval()
    try:
        # Not in inference mode: what a model keeps for its next pass may then be trained with.
        with torch.no_grad():
            written: Tensor = model.generate(input_ids=ids, attention_mask=mask, **sampling, **settings)
    finally:
        model.train(training)
    return written[:, ids.shape[1] :]


def _up_to(ends: Sequence[int], ids: list[int]) -> list[int]:
    first = next((place for place, token in enumerate(ids) if token in ends), len(ids))
    return ids[: first + 1]

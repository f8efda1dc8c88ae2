"""What is answered, in OpenAI's form."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hymba_tune.generate import TokenScore, Writing, token_score

CHUNK = 256
"""Tokens of a prompt whose logits are held at a time."""
BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class TokenTexts:
    """Tokens as texts.

    Args:
        tokenizer: Whose they are.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._anchor = tokenizer("a", add_special_tokens=False)["input_ids"]
        self.text = lru_cache(maxsize=2**16)(self._text)

    def _text(self, token: int) -> str:
        """Of one, with the space that it begins with, which a text of its own would lose."""
        before = self._tokenizer.decode(self._anchor)
        return str(self._tokenizer.decode([*self._anchor, token]))[len(before) :]

    def spelled(self, token: int) -> list[int]:
        """Its bytes."""
        byte = BYTE.fullmatch(str(self._tokenizer.convert_ids_to_tokens(token)))
        return [int(byte[1], 16)] if byte else list(self.text(token).encode())


def score_prompt(model: PreTrainedModel, ids: Sequence[int], top: int) -> list[TokenScore | None]:
    """What a model makes of a prompt's tokens, of which the first is predicted from nothing."""
    with torch.inference_mode():
        inputs = torch.tensor([list(ids)], device=model.device)
        hidden = model.model(inputs).last_hidden_state[0, :-1]
        scores: list[TokenScore | None] = [None]
        for begin in range(0, len(hidden), CHUNK):
            logits = model.lm_head(hidden[begin : begin + CHUNK]).float().log_softmax(-1)
            scores += [token_score(row, ids[begin + i + 1], top) for i, row in enumerate(logits)]
    return scores


def settled(text: str, stop: Sequence[str]) -> str:
    """What of an unfinished text will stay: no half character, nothing that may become a stop string."""
    text = text.rstrip("\ufffd")
    held = (size for word in stop for size in range(len(word) - 1, 0, -1) if text.endswith(word[:size]))
    return text[: len(text) - max(held, default=0)]


class AnswerStream:
    """An answer piece by piece.

    Args:
        text: That is being written.
        tokenizer: Its tokenizer.
        stripped: Whether white space around it is no part of it.
    """

    def __init__(self, text: Writing, tokenizer: PreTrainedTokenizerBase, *, stripped: bool) -> None:
        self.text = text
        self._tokenizer, self._stripped = tokenizer, stripped
        self._told = 0
        self._scored = 0
        self.ended: str | None = None
        """Why the text ended, when all of it is told."""

    def next(self) -> str:
        """What is new since the last time."""
        self.ended = self.text.ended  # before the rest: the text may grow meanwhile
        whole = self.text.text(self._tokenizer)
        whole = whole if self.ended else settled(whole, self.text.stop)
        whole = whole.strip() if self._stripped else whole
        piece, self._told = whole[self._told :], max(self._told, len(whole))
        return piece

    def scores(self) -> list[TokenScore]:
        """What was noted of the tokens that are new since the last time."""
        new, self._scored = self.text.scores[self._scored :], len(self.text.scores)
        return new


def head(kind: str, model: str) -> dict[str, Any]:
    """What every answer begins with."""
    prefix = "chatcmpl" if kind.startswith("chat") else "cmpl"
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}


def usage(prompts: int, texts: Sequence[Writing]) -> dict[str, int]:
    """Tokens that were read and written."""
    written = sum(len(text.ids) for text in texts)
    return {"prompt_tokens": prompts, "completion_tokens": written, "total_tokens": prompts + written}


def chat_logprobs(scores: Sequence[TokenScore], tokens: TokenTexts) -> dict[str, Any]:
    """Log-probabilities as chats have them."""

    def told(token: int, log_prob: float) -> dict[str, Any]:
        return {"token": tokens.text(token), "logprob": log_prob, "bytes": tokens.spelled(token)}

    return {
        "content": [
            told(score.token, score.log_prob) | {"top_logprobs": [told(*pair) for pair in score.top]}
            for score in scores
        ],
        "refusal": None,
    }


def completion_logprobs(
    scores: Sequence[TokenScore | None], ids: Sequence[int], tokens: TokenTexts, *, by_id: bool, begin: int = 0
) -> dict[str, Any]:
    """Log-probabilities as completions have them.

    Args:
        scores: Of each token, None for what is predicted from nothing.
        ids: The tokens.
        tokens: As texts.
        by_id: Call tokens ``token_id:7``, as vLLM does where asked to.
        begin: Where in the text the first one stands.
    """

    def name(token: int) -> str:
        return f"token_id:{token}" if by_id else tokens.text(token)

    offsets, place = [], begin
    for token in ids:
        offsets.append(place)
        place += len(tokens.text(token))
    return {
        "tokens": [name(token) for token in ids],
        "token_logprobs": [score and score.log_prob for score in scores],
        "top_logprobs": [score and {name(token): value for token, value in score.top} for score in scores],
        "text_offset": offsets,
    }


def prompt_logprobs(scores: Sequence[TokenScore | None], tokens: TokenTexts) -> list[dict[str, Any] | None]:
    """Log-probabilities of a prompt as vLLM tells them: by token id, with the token's own among them."""
    told: list[dict[str, Any] | None] = []
    for score in scores:
        if score is None:
            told.append(None)
            continue
        values = {score.token: score.log_prob} | dict(score.top)
        ranks = {token: rank for rank, (token, _) in enumerate(score.top, start=1)}
        told.append(
            {
                str(token): {"logprob": value, "rank": ranks.get(token), "decoded_token": tokens.text(token)}
                for token, value in values.items()
            }
        )
    return told

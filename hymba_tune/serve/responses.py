"""The parts of OpenAI's responses: streamed text, token counts and log-probabilities."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hymba_tune.generate import Generation, TokenScore, token_score
from hymba_tune.serve.tools import OPEN, call_entry, split_calls

CHUNK = 256
"""Number of prompt tokens whose logits are in memory at a time."""
BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class TokenTexts:
    """The text and the bytes of single tokens.

    Args:
        tokenizer: The tokenizer that the tokens belong to.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._anchor = tokenizer("a", add_special_tokens=False)["input_ids"]
        self.text = lru_cache(maxsize=2**16)(self._text)

    def _text(self, token: int) -> str:
        """The text of a token with its leading space, which decoding the token alone would lose."""
        anchor = self._tokenizer.decode(self._anchor)
        return str(self._tokenizer.decode([*self._anchor, token]))[len(anchor) :]

    def utf8(self, token: int) -> list[int]:
        """The bytes of a token."""
        byte = BYTE.fullmatch(str(self._tokenizer.convert_ids_to_tokens(token)))
        return [int(byte[1], 16)] if byte else list(self.text(token).encode())


def score_prompt(model: PreTrainedModel, ids: Sequence[int], top: int) -> list[TokenScore | None]:
    """The score of each prompt token; None for the first, which nothing predicts."""
    with torch.inference_mode():
        inputs = torch.tensor([list(ids)], device=model.device)
        hidden = model.model(inputs).last_hidden_state[0, :-1]
        scores: list[TokenScore | None] = [None]
        for begin in range(0, len(hidden), CHUNK):
            logits = model.lm_head(hidden[begin : begin + CHUNK]).float().log_softmax(-1)
            scores += [token_score(row, ids[begin + i + 1], top) for i, row in enumerate(logits)]
    return scores


def final_prefix(text: str, stop: Sequence[str]) -> str:
    """The part of an unfinished text that is final: no incomplete character, no possible start of a stop string."""
    text = text.rstrip("\ufffd")
    partial = (size for word in stop for size in range(len(word) - 1, 0, -1) if text.endswith(word[:size]))
    return text[: len(text) - max(partial, default=0)]


class AnswerStream:
    """Returns a generated answer in parts.

    Args:
        generation: The generation that is streamed.
        tokenizer: The model's tokenizer.
        stripped: Whether white space around the text is removed.
        reads_calls: Whether tool calls are separated from the text.
    """

    def __init__(
        self,
        generation: Generation,
        tokenizer: PreTrainedTokenizerBase,
        *,
        stripped: bool,
        reads_calls: bool = False,
    ) -> None:
        self.generation = generation
        self._tokenizer = tokenizer
        self._stripped = stripped
        self._reads_calls = reads_calls
        self._sent = 0
        self._scores_sent = 0
        self.calls: list[dict[str, Any]] = []
        """All tool calls so far."""
        self.finish_reason: str | None = None
        """Why generation ended; None until the whole text has been returned."""

    def next(self) -> str:
        """The new text since the last call."""
        # Read before the text, which may grow meanwhile on the model's thread.
        self.finish_reason = self.generation.finish_reason
        text = self.generation.text(self._tokenizer)
        if not self.finish_reason:
            text = final_prefix(text, (*self.generation.stop, *((OPEN,) if self._reads_calls else ())))
        if self._reads_calls:
            text = self._without_calls(text)
        if self._stripped:
            # The text that it continues ends where the client wants it to end.
            text = text.rstrip() if self.generation.continues_prompt else text.strip()

        new = text[self._sent :]
        self._sent = max(self._sent, len(text))
        return new

    def _without_calls(self, text: str) -> str:
        text, calls = split_calls(text, finished=self.finish_reason is not None)
        self.calls += [call_entry(call) for call in calls[len(self.calls) :]]
        if self.calls and self.finish_reason == "stop":
            self.finish_reason = "tool_calls"
        return text

    def scores(self) -> list[TokenScore]:
        """The scores of the new tokens since the last call."""
        new = self.generation.scores[self._scores_sent :]
        self._scores_sent = len(self.generation.scores)
        return new


def head(kind: str, model: str) -> dict[str, Any]:
    """The fields that every response starts with."""
    prefix = "chatcmpl" if kind.startswith("chat") else "cmpl"
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}


def message(text: str, stream: AnswerStream) -> dict[str, Any]:
    """A whole answer in the format of chat completions; ``content`` is null if there are tool calls only."""
    called = {"tool_calls": stream.calls} if stream.calls else {}
    return {"role": "assistant", "content": text or (None if called else ""), "refusal": None, **called}


def delta(text: str, calls: Sequence[dict[str, Any]], earlier: int) -> dict[str, Any]:
    """What is new of an answer in the format of chat completions: text, and the calls after ``earlier`` ones."""
    new = [{"index": number} | calls[number] for number in range(earlier, len(calls))]
    return ({"content": text} if text else {}) | ({"tool_calls": new} if new else {})


def usage(prompt_tokens: int, generations: Sequence[Generation]) -> dict[str, Any]:
    """The numbers of prompt tokens, of generated tokens, and of prompt tokens whose state was reused."""
    completion_tokens = sum(len(one.ids) for one in generations)
    prompts = {id(one.prompt): one.reused for one in reversed(generations)}  # several texts may continue one prompt
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(prompts.values())},
    }


def chat_logprobs(scores: Sequence[TokenScore], tokens: TokenTexts) -> dict[str, Any]:
    """Log-probabilities in the format of chat completions."""

    def entry(token: int, log_prob: float) -> dict[str, Any]:
        return {"token": tokens.text(token), "logprob": log_prob, "bytes": tokens.utf8(token)}

    return {
        "content": [
            entry(score.token, score.log_prob) | {"top_logprobs": [entry(*pair) for pair in score.top]}
            for score in scores
        ],
        "refusal": None,
    }


def completion_logprobs(
    scores: Sequence[TokenScore | None], ids: Sequence[int], tokens: TokenTexts, *, by_id: bool, begin: int = 0
) -> dict[str, Any]:
    """Log-probabilities in the format of text completions.

    Args:
        scores: The score of each token, None for a token that nothing predicts.
        ids: The token ids.
        tokens: The texts of tokens.
        by_id: Whether tokens are named by id, such as ``token_id:7``, an option of vLLM.
        begin: The offset of the first token in the text.
    """

    def name(token: int) -> str:
        return f"token_id:{token}" if by_id else tokens.text(token)

    offsets = []
    offset = begin
    for token in ids:
        offsets.append(offset)
        offset += len(tokens.text(token))
    return {
        "tokens": [name(token) for token in ids],
        "token_logprobs": [score and score.log_prob for score in scores],
        "top_logprobs": [score and {name(token): value for token, value in score.top} for score in scores],
        "text_offset": offsets,
    }


def prompt_logprobs(scores: Sequence[TokenScore | None], tokens: TokenTexts) -> list[dict[str, Any] | None]:
    """A prompt's log-probabilities in vLLM's format: by token id, including the prompt's own tokens."""
    entries: list[dict[str, Any] | None] = []
    for score in scores:
        if score is None:
            entries.append(None)
            continue
        values = {score.token: score.log_prob} | dict(score.top)
        ranks = {token: rank for rank, (token, _) in enumerate(score.top, start=1)}
        entries.append(
            {
                str(token): {"logprob": value, "rank": ranks.get(token), "decoded_token": tokens.text(token)}
                for token, value in values.items()
            }
        )
    return entries

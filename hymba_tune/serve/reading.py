"""Reads requests: parses, checks and tokenizes them. This takes long for long ones, so not on the event loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from hymba_tune.data import Conversation, Message, encode_prompt
from hymba_tune.data.messages import read_message, with_context_first
from hymba_tune.errors import DataError
from hymba_tune.generate import Generation, Sampling
from hymba_tune.serve.requests import ApiError, BaseRequest, ChatRequest, CompletionRequest, read_request

CACHED_TEXTS = 256
"""Number of texts whose tokens the tokenizer keeps: the parts of a chat template that every request has."""


@dataclass(frozen=True)
class Limits:
    """The limits of a request.

    Attributes:
        context: Maximum number of tokens of prompt and answer together, and of messages of a chat.
        new_tokens: Maximum number of tokens of an answer.
        texts: Maximum number of texts to generate.
        body: Maximum size of a request's body, in bytes.
    """

    context: int
    new_tokens: int
    texts: int
    body: int


class RequestReader:
    """Turns the bodies of requests into generations.

    Args:
        name: The model's name in requests.
        tokenizer: A tokenizer with a chat template.
        limits: The limits of each request.
    """

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerBase, limits: Limits) -> None:
        self._name = name
        self._tokenizer = tokenizer
        self._limits = limits
        _limit_cache(tokenizer)

    def check_model(self, name: str) -> None:
        """Check that a request is for this server's model.

        Raises:
            ApiError: If it is for another model.
        """
        if name != self._name:
            raise ApiError(
                404,
                f"The model {name!r} does not exist; this server has {self._name!r}.",
                param="model",
                code="model_not_found",
            )

    def chat(self, body: bytes) -> tuple[ChatRequest, list[Generation]]:
        """Read a request to continue a conversation.

        Raises:
            ApiError: If it cannot be answered.
        """
        request = read_request(ChatRequest, body)
        self.check_model(request.model)
        if len(request.messages) > self._limits.context:
            raise ApiError(
                400,
                f"messages: {len(request.messages):,} messages exceed the model's context of "
                f"{self._limits.context:,} tokens.",
                param="messages",
                code="context_length_exceeded",
            )
        try:
            prompt = encode_prompt(Conversation(tuple(_messages(request.messages))), self._tokenizer)
        except DataError as error:
            raise ApiError(400, f"messages: {error.what}.", param="messages") from None

        top = (request.top_logprobs or 0) if request.logprobs else None
        limit = request.limit or min(self._limits.new_tokens, max(self._limits.context - len(prompt), 1))
        return request, self._generations(request, [prompt], limit, top, continues_prompt=False)

    def completion(self, body: bytes) -> tuple[CompletionRequest, list[Generation]]:
        """Read a request to continue prompts.

        Raises:
            ApiError: If it cannot be answered.
        """
        request = read_request(CompletionRequest, body)
        self.check_model(request.model)
        self._check_count(request, request.prompts)
        prompts = [self._ids(prompt) for prompt in request.prompts]
        if not prompts or not all(prompts):
            raise ApiError(400, "prompt is empty; expected text or token ids.", param="prompt")
        if request.stream and (request.echo or request.scores_prompt):
            raise ApiError(400, "echo and prompt_logprobs cannot be streamed.", param="stream")
        if not request.max_tokens and not (request.echo or request.scores_prompt):
            raise ApiError(400, "max_tokens: 0 needs echo or prompt_logprobs.", param="max_tokens")
        return request, self._generations(request, prompts, request.max_tokens, request.logprobs, continues_prompt=True)

    def _ids(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            ids: list[int] = self._tokenizer(prompt)["input_ids"]
            return ids
        if not all(0 <= token < len(self._tokenizer) for token in prompt):
            raise ApiError(400, f"prompt: token ids must be from 0 to {len(self._tokenizer) - 1:,}.", param="prompt")
        return prompt

    def _check_count(self, request: BaseRequest, prompts: Sequence[object]) -> None:
        count = request.n * len(prompts)
        if count > self._limits.texts:  # waiting would not help
            raise ApiError(
                400,
                f"The request is for {count:,} texts; at most {self._limits.texts:,} on this server (--queue).",
                param="n" if request.n > len(prompts) else "prompt",
            )

    def _generations(
        self,
        request: BaseRequest,
        prompts: Sequence[list[int]],
        limit: int,
        top: int | None,
        *,
        continues_prompt: bool,
    ) -> list[Generation]:
        self._check_count(request, prompts)
        if limit > self._limits.new_tokens:
            raise ApiError(400, f"max_tokens: at most {self._limits.new_tokens:,} on this server.", param="max_tokens")
        for prompt in prompts:
            if len(prompt) + limit > self._limits.context:
                raise ApiError(
                    400,
                    f"{len(prompt):,} prompt tokens and {limit:,} new tokens exceed the model's context of "
                    f"{self._limits.context:,} tokens.",
                    param="messages" if isinstance(request, ChatRequest) else "prompt",
                    code="context_length_exceeded",
                )
        return [
            Generation(
                prompts[number // request.n],
                limit,
                Sampling(
                    request.temperature,
                    request.top_p,
                    None if request.seed is None else request.seed % 2**62 + number,
                ),
                stop=tuple(request.stop or ()),
                continues_prompt=continues_prompt,
                top=top,
                number=number,
            )
            for number in range(request.n * len(prompts))
        ]


def _limit_cache(tokenizer: PreTrainedTokenizerBase) -> None:
    """Limit the cache of a tokenizer that does not split texts into words.

    It caches the tokens of 10,000 words, which then are whole texts: up to 100 MB that are never used again.
    """
    backend = tokenizer.backend_tokenizer
    if backend.pre_tokenizer is None and hasattr(backend.model, "_resize_cache"):
        backend.model._resize_cache(CACHED_TEXTS)


def _messages(items: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Read the messages of a chat.

    Raises:
        ApiError: If there is nothing to answer.
        DataError: If a message cannot be used.
    """
    messages = [
        Message("assistant", "") if _is_empty_answer(item) else read_message(item, f"message {number}", {})
        for number, item in enumerate(items, start=1)
    ]
    if messages[-1].role == "assistant":
        raise ApiError(400, "messages: the last one is the assistant's; expected a user's.", param="messages")
    return with_context_first(messages)


def _is_empty_answer(item: Mapping[str, Any]) -> bool:
    """Return whether a message is an answer without content, as models give; training data may not have it."""
    content = item.get("content")
    empty = content is None or content == [] or (isinstance(content, str) and not content.strip())
    return item.get("role") == "assistant" and empty and not item.get("tool_calls") and not item.get("function_call")

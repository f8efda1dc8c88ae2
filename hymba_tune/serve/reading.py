"""Reads requests: parses, checks and tokenizes them. This takes long for long ones, so not on the event loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from hymba_tune.data import Conversation, Message, render_prompt
from hymba_tune.data.chat import Rendered, tokenize
from hymba_tune.data.messages import read_message, with_context_first
from hymba_tune.errors import DataError
from hymba_tune.generate import Constraint, Generation, Grammars, Sampling
from hymba_tune.serve.items import ResponsesRequest
from hymba_tune.serve.requests import (
    ApiError,
    BaseRequest,
    ChatRequest,
    CompletionRequest,
    read_request,
    validation_errors,
)
from hymba_tune.serve.tools import CLOSE, answer_grammar, content_grammar
from hymba_tune.serve.turns import Turns

CACHED_TEXTS = 256
"""Number of texts whose tokens the tokenizer keeps: the parts of a chat template that every request has."""
ReadType = TypeVar("ReadType", bound=BaseRequest)
SMALLEST_CUT = 32
"""Number of tokens of the shortest beginning that is worth a pass of its own."""


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
        self._grammars = Grammars(tokenizer)
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
        return request, self._answers(request)

    def response(self, body: bytes) -> tuple[ResponsesRequest, ChatRequest, Generation]:
        """Read a request for a response, as a chat.

        Raises:
            ApiError: If it cannot be answered.
        """
        request = read_request(ResponsesRequest, body)
        with validation_errors():
            chat = request.as_chat()
        return request, chat, self._answers(chat)[0]

    def _answers(self, request: ChatRequest) -> list[Generation]:
        self.check_model(request.model)
        if len(request.messages) > self._limits.context:
            raise ApiError(
                400,
                f"messages: {len(request.messages):,} messages exceed the model's context of "
                f"{self._limits.context:,} tokens.",
                param="messages",
                code="context_length_exceeded",
            )
        messages = self._messages(request)
        prefill = ""
        if messages[-1].role == "assistant":
            prefill = messages.pop().content
        elif request.continue_final_message:
            raise ApiError(400, "continue_final_message: the last message is not the assistant's.", param="messages")
        prompt, cuts = self._prompt(request, messages, prefill)

        top = (request.top_logprobs or 0) if request.logprobs else None
        limit = request.limit or min(self._limits.new_tokens, max(self._limits.context - len(prompt), 1))
        stop = (CLOSE,) if request.usable_tools and not request.parallel_tool_calls else ()
        constraint = self._constraint(answer_grammar, request, prefill)
        continues = bool(prefill)
        return self._generations(
            request, [prompt], limit, top, continues_prompt=continues, stop=stop, constraint=constraint, cuts=cuts
        )

    def _messages(self, request: ChatRequest) -> list[Message]:
        """Read the messages of a chat; the last one may be the beginning of the answer."""
        try:
            messages = [
                Message("assistant", "") if _is_empty_answer(item) else read_message(item, f"message {number}", {})
                for number, item in enumerate(request.messages, start=1)
            ]
            last = messages[-1]
            if last.role == "assistant" and (request.messages[-1].get("tool_calls") or len(messages) == 1):
                raise ApiError(
                    400, "messages: there is nothing to answer; expected a message after it.", param="messages"
                )
            return with_context_first(messages)
        except DataError as error:
            raise ApiError(400, f"messages: {error.what}.", param="messages") from None

    def _prompt(
        self, request: ChatRequest, messages: Sequence[Message], prefill: str
    ) -> tuple[list[int], tuple[int, ...]]:
        """Tokenize a conversation up to the answer, and the beginning of the answer.

        Returns:
            The token ids, and where other chats may differ from this one; see `Generation.cuts`.
        """
        tools = tuple(tool.shown for tool in request.usable_tools)
        try:
            text = render_prompt(Conversation(tuple(messages), tools), self._tokenizer)
            cuts = [(0, place) for place in self._turns.cuts(text)]
            encoded = tokenize([Rendered(text + prefill, tuple(cuts))], self._tokenizer)[0]
        except DataError as error:
            raise ApiError(400, f"messages: {error.what}.", param="messages") from None
        if any(tool.function.name not in text for tool in request.usable_tools):
            raise ApiError(400, "tools: the model's chat template shows no tools.", param="tools")
        return encoded.input_ids, tuple(end for _, end in encoded.spans if end >= SMALLEST_CUT)

    @cached_property
    def _turns(self) -> Turns:
        return Turns.of(self._tokenizer)

    def _constraint(
        self, grammar_of: Callable[[ReadType], str | None], request: ReadType, prefill: str = ""
    ) -> Constraint | None:
        """Compile the grammar of a request's answers, and advance it by the beginning of the answer."""
        try:
            grammar = grammar_of(request)
            if grammar is None:
                return None
            constraint = self._grammars.lark(grammar)
        except DataError as error:
            raise ApiError(400, f"The schema cannot be enforced: {error.what}.", param="response_format") from None
        if prefill and not constraint.skip(self._grammars.tokens(prefill)):
            raise ApiError(400, "messages: the beginning of the answer does not have its form.", param="messages")
        return constraint

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
        constraint = self._constraint(content_grammar, request)
        return request, self._generations(
            request, prompts, request.max_tokens, request.logprobs, continues_prompt=True, constraint=constraint
        )

    def _ids(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            ids: list[int] = self._tokenizer(prompt)["input_ids"]
            return ids
        self._check_ids(prompt, "prompt")
        return prompt

    def _check_ids(self, ids: Iterable[int], param: str) -> None:
        if not all(0 <= token < len(self._tokenizer) for token in ids):
            raise ApiError(400, f"{param}: token ids must be from 0 to {len(self._tokenizer) - 1:,}.", param=param)

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
        stop: tuple[str, ...] = (),
        constraint: Constraint | None = None,
        cuts: tuple[int, ...] = (),
    ) -> list[Generation]:
        self._check_count(request, prompts)
        self._check_ids(request.logit_bias, "logit_bias")
        self._check_ids(request.stop_token_ids, "stop_token_ids")
        if limit > self._limits.new_tokens:
            raise ApiError(400, f"max_tokens: at most {self._limits.new_tokens:,} on this server.", param="max_tokens")
        for prompt in prompts:
            if len(prompt) + limit > self._limits.context:
                raise ApiError(
                    400,
                    # Clients recognize the error by OpenAI's wording of it.
                    f"This model's maximum context length is {self._limits.context:,} tokens; the request is for "
                    f"{len(prompt):,} prompt tokens and {limit:,} new tokens.",
                    param="messages" if isinstance(request, ChatRequest) else "prompt",
                    code="context_length_exceeded",
                )
        return [
            Generation(
                prompts[number // request.n],
                limit,
                _sampling(request, number),
                stop=(*(request.stop or ()), *stop),
                stop_ids=frozenset(request.stop_token_ids),
                constraint=constraint and constraint.copy(),
                continues_prompt=continues_prompt,
                top=top,
                cuts=cuts,
                number=number,
            )
            for number in range(request.n * len(prompts))
        ]


def _sampling(request: BaseRequest, number: int) -> Sampling:
    """How the tokens of a text of a request are chosen."""
    return Sampling(
        request.temperature,
        request.top_p,
        None if request.seed is None else request.seed % 2**62 + number,
        max(request.top_k, 0),
        request.min_p,
        request.repetition_penalty,
        request.presence_penalty,
        request.frequency_penalty,
        request.logit_bias,
    )


def _limit_cache(tokenizer: PreTrainedTokenizerBase) -> None:
    """Limit the cache of a tokenizer that does not split texts into words.

    It caches the tokens of 10,000 words, which then are whole texts: up to 100 MB that are never used again.
    """
    backend = tokenizer.backend_tokenizer
    if backend.pre_tokenizer is None and hasattr(backend.model, "_resize_cache"):
        backend.model._resize_cache(CACHED_TEXTS)


def _is_empty_answer(item: Mapping[str, Any]) -> bool:
    """Return whether a message is an answer without content, as models give; training data may not have it."""
    content = item.get("content")
    empty = content is None or content == [] or (isinstance(content, str) and not content.strip())
    return item.get("role") == "assistant" and empty and not item.get("tool_calls") and not item.get("function_call")

"""The HTTP routes: chat and text completions, whole or streamed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from transformers import PreTrainedTokenizerBase

from hymba_tune.data import Conversation, encode_prompt
from hymba_tune.data.messages import read_messages, with_context_first
from hymba_tune.errors import DataError
from hymba_tune.generate import Generation, Sampling, TokenScore
from hymba_tune.serve.requests import ApiError, BaseRequest, ChatRequest, CompletionRequest, read_request
from hymba_tune.serve.responses import (
    AnswerStream,
    TokenTexts,
    chat_logprobs,
    completion_logprobs,
    head,
    prompt_logprobs,
    score_prompt,
    usage,
)
from hymba_tune.serve.worker import Job, QueueFullError, Worker

BODY_SECONDS = 30
"""Time limit for receiving a request's body, in seconds."""
LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
Choice = Callable[[AnswerStream, bool], dict[str, Any]]
"""Builds a response's choice from a generation; if the flag is set, a chunk with only what is new."""


@dataclass(frozen=True)
class Limits:
    """The limits of a request.

    Attributes:
        context: Maximum number of tokens of prompt and answer together.
        new_tokens: Maximum number of tokens of an answer.
        body: Maximum size of a request's body, in bytes.
    """

    context: int
    new_tokens: int
    body: int


class Service:
    """Chat and text completions with one model.

    Args:
        name: The model's name in requests and responses.
        tokenizer: A tokenizer with a chat template.
        worker: The thread that generates.
        limits: The limits of each request.
    """

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerBase, worker: Worker, limits: Limits) -> None:
        self._name = name
        self._tokenizer = tokenizer
        self._worker = worker
        self._limits = limits
        self._tokens = TokenTexts(tokenizer)

    def app(self, *, local: bool) -> Starlette:
        """The ASGI application.

        Args:
            local: Whether only local connections are accepted. Requests must then name this machine as their host, so
                that a page in a browser cannot reach the model through a domain name of its own (DNS rebinding).
        """
        hosts = [Middleware(TrustedHostMiddleware, allowed_hosts=[*LOCAL_HOSTS, "[::1]"])] if local else []
        return Starlette(
            routes=[
                Route("/health", self._health),
                Route("/v1/models", self._models),
                Route("/v1/models/{name:path}", self._model),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
                Route("/v1/completions", self._complete, methods=["POST"]),
            ],
            middleware=hosts,
            exception_handlers={ApiError: _api_error, HTTPException: _http_error, Exception: _internal_error},
        )

    async def _health(self, _: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def _model(self, request: Request) -> Response:
        self._check_model(request.path_params["name"])
        return JSONResponse(self._card())

    def _card(self) -> dict[str, Any]:
        return {"id": self._name, "object": "model", "owned_by": "hymba-tune", "max_model_len": self._limits.context}

    def _check_model(self, name: str) -> None:
        if name != self._name:
            raise ApiError(
                404,
                f"The model {name!r} does not exist; this server has {self._name!r}.",
                param="model",
                code="model_not_found",
            )

    async def _read_body(self, request: Request) -> Any:
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise ApiError(415, "The body must be JSON, with Content-Type: application/json.")
        limit = self._limits.body
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in request.stream():
                    body += part
                    if len(body) > limit:
                        raise ApiError(413, f"The body is larger than {limit:,} bytes.", code="request_too_large")
            return json.loads(body)
        except TimeoutError:
            raise ApiError(408, f"The body did not arrive within {BODY_SECONDS} seconds.") from None
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"The body is not JSON: {error}.") from None

    async def _chat(self, http: Request) -> Response:
        request = read_request(ChatRequest, await self._read_body(http))
        self._check_model(request.model)
        try:
            messages = with_context_first(read_messages(list(request.messages), {}))
            if messages[-1].role == "assistant":
                raise ApiError(400, "messages: the last one is the assistant's; expected a user's.", param="messages")
            prompt = encode_prompt(Conversation(tuple(messages)), self._tokenizer)
        except DataError as error:
            raise ApiError(400, f"messages: {error.what}.", param="messages") from None

        top = (request.top_logprobs or 0) if request.logprobs else None
        limit = request.limit or min(self._limits.new_tokens, max(self._limits.context - len(prompt), 1))
        generations = self._generations(request, [prompt], limit, top, continues_prompt=False)

        def choice(stream: AnswerStream, streamed: bool) -> dict[str, Any]:
            text = stream.next()
            scores = stream.scores()
            message = {"role": "assistant", "content": text, "refusal": None}
            return {
                "index": stream.generation.number,
                **({"delta": {"content": text} if text else {}} if streamed else {"message": message}),
                "logprobs": chat_logprobs(scores, self._tokens) if top is not None else None,
                "finish_reason": stream.finish_reason,
            }

        first_chunks = [
            {"index": i, "delta": {"role": "assistant", "content": ""}, "finish_reason": None} for i in range(request.n)
        ]
        begin = head("chat.completion.chunk" if request.stream else "chat.completion", self._name)
        return await self._answer(http, request, generations, begin, choice, len(prompt), first_chunks, stripped=True)

    async def _complete(self, http: Request) -> Response:
        request = read_request(CompletionRequest, await self._read_body(http))
        self._check_model(request.model)
        prompts = [self._ids(prompt) for prompt in request.prompts]
        if not prompts or not all(prompts):
            raise ApiError(400, "prompt is empty; expected text or token ids.", param="prompt")
        scored = request.prompt_logprobs is not None or (request.echo and request.logprobs is not None)
        if request.stream and (request.echo or scored):
            raise ApiError(400, "echo and prompt_logprobs cannot be streamed.", param="stream")
        if not request.max_tokens and not (request.echo or scored):
            raise ApiError(400, "max_tokens: 0 needs echo or prompt_logprobs.", param="max_tokens")

        generations = self._generations(request, prompts, request.max_tokens, request.logprobs, continues_prompt=True)
        top = max(request.prompt_logprobs or 0, request.logprobs or 0)
        prompt_scores = [await self._score(ids, top) for ids in prompts] if scored else None

        def choice(stream: AnswerStream, streamed: bool) -> dict[str, Any]:
            text = stream.next()
            scores = stream.scores()
            number = stream.generation.number
            own_prompt = prompt_scores[number // request.n] if prompt_scores else None
            choice = {"index": number, "text": text, "logprobs": None, "finish_reason": stream.finish_reason}
            if not streamed:  # a request for the prompt's scores alone generates nothing, so that nothing finishes
                choice["finish_reason"] = stream.finish_reason or "length"
            if request.logprobs is not None or request.echo:
                choice |= self._completion_scores(request, stream.generation, text, scores, own_prompt)
            if request.prompt_logprobs is not None and own_prompt is not None:
                choice["prompt_logprobs"] = prompt_logprobs(own_prompt, self._tokens)
            return choice

        begin = head("text_completion", self._name)
        count = sum(map(len, prompts))
        return await self._answer(http, request, generations, begin, choice, count, [], stripped=False)

    def _completion_scores(
        self,
        request: CompletionRequest,
        generation: Generation,
        text: str,
        scores: Sequence[TokenScore],
        prompt_scores: Sequence[TokenScore | None] | None,
    ) -> dict[str, Any]:
        """A completion's text and log-probabilities, preceded by the prompt's if it is echoed."""
        prompt = self._tokenizer.decode(generation.prompt, skip_special_tokens=True) if request.echo else ""
        if request.logprobs is None:
            return {"text": prompt + text}
        all_scores = [*(prompt_scores or [] if request.echo else []), *scores]
        ids = [*(generation.prompt if request.echo else []), *(score.token for score in scores)]
        by_id = request.return_tokens_as_token_ids
        return {"text": prompt + text, "logprobs": completion_logprobs(all_scores, ids, self._tokens, by_id=by_id)}

    def _ids(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            ids: list[int] = self._tokenizer(prompt)["input_ids"]
            return ids
        if not all(0 <= token < len(self._tokenizer) for token in prompt):
            raise ApiError(400, f"prompt: token ids must be from 0 to {len(self._tokenizer) - 1:,}.", param="prompt")
        return prompt

    def _generations(
        self,
        request: BaseRequest,
        prompts: Sequence[list[int]],
        limit: int,
        top: int | None,
        *,
        continues_prompt: bool,
    ) -> list[Generation]:
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

    async def _score(self, ids: list[int], top: int) -> list[TokenScore | None]:
        with _full_queue_as_error():
            scores = self._worker.call(lambda model: score_prompt(model, ids, top))
        result: list[TokenScore | None] = await asyncio.wrap_future(scores)
        return result

    async def _answer(
        self,
        http: Request,
        request: BaseRequest,
        generations: list[Generation],
        begin: dict[str, Any],
        choice: Choice,
        prompt_tokens: int,
        first_chunks: list[dict[str, Any]],
        *,
        stripped: bool,
    ) -> Response:
        streams = [AnswerStream(one, self._tokenizer, stripped=stripped) for one in generations]

        def whole() -> Response:
            choices = [choice(stream, False) for stream in streams]
            return JSONResponse(begin | {"choices": choices, "usage": usage(prompt_tokens, generations)})

        if not generations[0].max_new_tokens:  # the request is for the prompt's scores alone
            return whole()
        changes = self._changes(generations)
        if request.stream:
            await anext(changes)  # a full queue raises here, before the response's status is sent
            counted = request.stream_options is not None and request.stream_options.include_usage
            return StreamingResponse(
                _stream(changes, streams, begin, choice, first_chunks, prompt_tokens if counted else None),
                media_type="text/event-stream",
                headers={"Cache-Control": "no-store"},
            )
        async for _ in changes:
            if await http.is_disconnected():
                await changes.aclose()
                return Response(status_code=499)  # the client has closed the connection and gets no response
        return whole()

    async def _changes(self, generations: list[Generation]) -> AsyncGenerator[None, None]:
        """Yields once the generations are queued, and after each change; closing the iterator cancels them."""
        changed = asyncio.Event()
        loop = asyncio.get_running_loop()

        def notify() -> None:
            with suppress(RuntimeError):  # the event loop is closed
                loop.call_soon_threadsafe(changed.set)

        job = Job(generations, notify)
        with _full_queue_as_error():
            self._worker.submit(job)
        try:
            yield
            while not job.done:
                await changed.wait()
                changed.clear()
                if not job.error:
                    yield
            if job.error:  # may have occurred before the first check
                raise ApiError(500, f"The model failed: {job.error}", kind="server_error")
            yield  # for tokens that were generated while the caller handled the last change
        finally:
            if not job.done:
                self._worker.drop(job)


async def _stream(
    changes: AsyncGenerator[None, None],
    streams: Sequence[AnswerStream],
    begin: dict[str, Any],
    choice: Choice,
    first_chunks: list[dict[str, Any]],
    prompt_tokens: int | None,
) -> AsyncIterator[str]:
    """Server-sent events: what is new of each generation, and at the end the usage, if ``prompt_tokens`` is given."""
    try:
        for first in first_chunks:
            yield _event(begin | {"choices": [first]})

        active = list(streams)
        async for _ in changes:
            for stream in active:
                chunk = choice(stream, True)
                if chunk.get("text") or chunk.get("delta") or chunk["logprobs"] or stream.finish_reason:
                    yield _event(begin | {"choices": [chunk]})
            active = [stream for stream in active if not stream.finish_reason]

        if prompt_tokens is not None:
            totals = usage(prompt_tokens, [stream.generation for stream in streams])
            yield _event(begin | {"choices": [], "usage": totals})
        yield "data: [DONE]\n\n"
    except ApiError as error:  # the status is already sent
        yield _event(error.body)
    finally:
        await changes.aclose()


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


@contextmanager
def _full_queue_as_error() -> Iterator[None]:
    try:
        yield
    except QueueFullError:
        raise ApiError(
            429, "The queue is full; try again later.", kind="rate_limit_error", code="rate_limit_exceeded"
        ) from None


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, error.status, {"Retry-After": "1"} if error.status == 429 else None)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    body = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}.").body
    return JSONResponse(body, error.status_code, error.headers)


async def _internal_error(_: Request, error: Exception) -> Response:
    return JSONResponse(ApiError(500, type(error).__name__, kind="server_error").body, 500)

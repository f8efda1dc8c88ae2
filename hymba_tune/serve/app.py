"""The HTTP routes: chat and text completions, whole or streamed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from transformers import PreTrainedTokenizerBase

from hymba_tune.generate import Generation, TokenScore
from hymba_tune.serve.exchange import (
    Choice,
    KeyCheck,
    disconnected,
    drain,
    full_queue,
    handle_api_error,
    handle_http_error,
    handle_internal_error,
    read_body,
    stream_events,
    while_connected,
    worker_errors,
)
from hymba_tune.serve.items import ItemWriter, stream_items
from hymba_tune.serve.metrics import RequestCounter, ServerMetrics
from hymba_tune.serve.reading import Limits, RequestReader
from hymba_tune.serve.requests import ApiError, BaseRequest, CompletionRequest
from hymba_tune.serve.responses import (
    AnswerStream,
    TokenTexts,
    chat_logprobs,
    completion_logprobs,
    delta,
    head,
    message,
    prompt_logprobs,
    score_prompt,
    usage,
)
from hymba_tune.serve.worker import Job, Worker

LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
COUNTED = frozenset(["/health", "/metrics", "/v1/models", "/v1/chat/completions", "/v1/completions", "/v1/responses"])
"""The routes that are counted by name."""
Read = TypeVar("Read")


class Service:
    """Chat and text completions with one model.

    Args:
        name: The model's name in requests and responses.
        tokenizer: A tokenizer with a chat template.
        worker: The thread that generates.
        limits: The limits of each request.
        metrics: The counts and times of the server.
    """

    def __init__(
        self, name: str, tokenizer: PreTrainedTokenizerBase, worker: Worker, limits: Limits, metrics: ServerMetrics
    ) -> None:
        self._name = name
        self._tokenizer = tokenizer
        self._worker = worker
        self._limits = limits
        self._metrics = metrics
        self._tokens = TokenTexts(tokenizer)
        self._reader = RequestReader(name, tokenizer, limits)
        self._reading = ThreadPoolExecutor(1, "requests")
        self._started = int(time.time())
        self._waiting = 0
        """The number of requests that are being read, or wait for it."""

    def app(self, *, local: bool, origins: Sequence[str] = (), key: str | None = None) -> Starlette:
        """The ASGI application.

        Args:
            local: Whether only local connections are accepted. Requests must then name this machine as their host, so
                that a page in a browser cannot reach the model through a domain name of its own (DNS rebinding).
            origins: The web pages that may use the server from a browser, or ``*``.
            key: The key that requests must have; None accepts all.
        """
        layers = [Middleware(RequestCounter, metrics=self._metrics, routes=COUNTED)]
        if local:
            layers.append(Middleware(TrustedHostMiddleware, allowed_hosts=[*LOCAL_HOSTS, "[::1]"]))
        if origins:  # before the key, which a browser does not send when it asks what it may send
            layers.append(Middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"]))
        if key:
            layers.append(Middleware(KeyCheck, key=key))
        return Starlette(
            routes=[
                Route("/health", self._health),
                Route("/metrics", self._show_metrics),
                Route("/v1/models", self._models),
                Route("/v1/models/{name:path}", self._model),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
                Route("/v1/completions", self._complete, methods=["POST"]),
                Route("/v1/responses", self._respond, methods=["POST"]),
            ],
            middleware=layers,
            exception_handlers={
                ApiError: handle_api_error,
                HTTPException: handle_http_error,
                ClientDisconnect: disconnected,
                Exception: handle_internal_error,
            },
        )

    def close(self) -> None:
        """End the thread that reads requests."""
        self._reading.shutdown(wait=False, cancel_futures=True)

    async def _health(self, _: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _show_metrics(self, _: Request) -> Response:
        return self._metrics.response()

    async def _models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def _model(self, request: Request) -> Response:
        self._reader.check_model(request.path_params["name"])
        return JSONResponse(self._card())

    def _card(self) -> dict[str, Any]:
        return {
            "id": self._name,
            "object": "model",
            "created": self._started,
            "owned_by": "hymba-tune",
            "max_model_len": self._limits.context,
        }

    async def _chat(self, http: Request) -> Response:
        body = await read_body(http, self._limits.body)
        return await while_connected(http, self._chat_response(body))

    async def _complete(self, http: Request) -> Response:
        body = await read_body(http, self._limits.body)
        return await while_connected(http, self._completion_response(body))

    async def _respond(self, http: Request) -> Response:
        body = await read_body(http, self._limits.body)
        return await while_connected(http, self._items_response(body))

    async def _read(self, read: Callable[[bytes], Read], body: bytes) -> Read:
        """Read a request on the thread for that, so that a long one does not hold up the streams of others."""
        if self._waiting >= self._limits.texts:
            raise full_queue()
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._reading, read, body)
        finally:
            self._waiting -= 1

    async def _chat_response(self, body: bytes) -> Response:
        request, generations = await self._read(self._reader.chat, body)

        def choice(stream: AnswerStream, streamed: bool) -> dict[str, Any]:
            earlier = len(stream.calls)
            text = stream.next()
            scores = stream.scores()
            return {
                "index": stream.generation.number,
                **({"delta": delta(text, stream.calls, earlier)} if streamed else {"message": message(text, stream)}),
                "logprobs": chat_logprobs(scores, self._tokens) if request.logprobs else None,
                "finish_reason": stream.finish_reason,
            }

        first_chunks = [
            {"index": i, "delta": {"role": "assistant", "content": ""}, "finish_reason": None} for i in range(request.n)
        ]
        begin = head("chat.completion.chunk" if request.stream else "chat.completion", self._name)
        streams = [
            AnswerStream(one, self._tokenizer, stripped=True, reads_calls=bool(request.usable_tools))
            for one in generations
        ]
        return await self._answer(request, streams, begin, choice, first_chunks)

    async def _completion_response(self, body: bytes) -> Response:
        request, generations = await self._read(self._reader.completion, body)
        prompt_scores: list[list[TokenScore | None]] = []
        if request.scores_prompt:
            top = max(request.prompt_logprobs or 0, request.logprobs or 0)
            prompt_scores = [await self._score(one.prompt, top) for one in generations[:: request.n]]

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
        streams = [AnswerStream(one, self._tokenizer, stripped=False) for one in generations]
        return await self._answer(request, streams, begin, choice, [])

    async def _items_response(self, body: bytes) -> Response:
        request, chat, generation = await self._read(self._reader.response, body)
        stream = AnswerStream(generation, self._tokenizer, stripped=True, reads_calls=bool(chat.usable_tools))
        writer = ItemWriter(request, self._name, stream)
        changes = self._changes([generation])
        if request.stream:
            return await self._events(changes, stream_items(changes, writer))
        await drain(changes)
        list(writer.changes())
        return JSONResponse(writer.body())

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

    async def _score(self, ids: Sequence[int], top: int) -> list[TokenScore | None]:
        with worker_errors():
            scores: Future[list[TokenScore | None]] = self._worker.call(lambda model: score_prompt(model, ids, top))
            return await asyncio.wrap_future(scores)

    async def _answer(
        self,
        request: BaseRequest,
        streams: list[AnswerStream],
        begin: dict[str, Any],
        choice: Choice,
        first_chunks: list[dict[str, Any]],
    ) -> Response:
        generations = [stream.generation for stream in streams]
        prompt_tokens = sum(len(one.prompt) for one in generations[:: request.n])

        def whole() -> Response:
            choices = [choice(stream, False) for stream in streams]
            return JSONResponse(begin | {"choices": choices, "usage": usage(prompt_tokens, generations)})

        if generations[0].max_new_tokens:  # otherwise the request is for the prompt's scores alone
            changes = self._changes(generations)
            if request.stream:
                counted = request.stream_options is not None and request.stream_options.include_usage
                tokens = prompt_tokens if counted else None
                events = stream_events(changes, streams, begin, choice, first_chunks, tokens)
                return await self._events(changes, events)
            await drain(changes)
        return await asyncio.to_thread(whole)  # a response with many log-probabilities takes seconds

    async def _events(self, changes: AsyncGenerator[None, None], events: AsyncIterator[str]) -> Response:
        await anext(changes)  # a full queue raises here, before the response's status is sent
        return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    async def _changes(self, generations: list[Generation]) -> AsyncGenerator[None, None]:
        """Yields once the generations are queued, and after each change; closing the iterator cancels them."""
        changed = asyncio.Event()
        loop = asyncio.get_running_loop()

        def notify() -> None:
            with suppress(RuntimeError):  # the event loop is closed
                loop.call_soon_threadsafe(changed.set)

        job = Job(generations, notify)
        with worker_errors():
            self._worker.submit(job)
            try:
                yield
                while not job.done:
                    await changed.wait()
                    changed.clear()
                    if not job.error:
                        yield
                if job.error:  # may have occurred before the first check
                    raise job.error
                yield  # for tokens that were generated while the caller handled the last change
            finally:
                self._worker.drop(job)

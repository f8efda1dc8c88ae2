"""The routes: requests in, texts out, whole or as they are written."""

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
from hymba_tune.data.messages import read_messages
from hymba_tune.errors import DataError
from hymba_tune.generate import Sampling, TokenScore, Writing
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
"""That a request's body may take to come."""
LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
Choice = Callable[[AnswerStream, bool], dict[str, Any]]
"""What is told of a text, since the last time where that is streamed."""


@dataclass(frozen=True)
class Limits:
    """What a request may have.

    Attributes:
        context: TokenTexts that prompt and answer may have together.
        new_tokens: TokenTexts of an answer.
        body: Bytes of a request.
    """

    context: int
    new_tokens: int
    body: int


class Service:
    """Chats and completions with one model.

    Args:
        name: What the model is called.
        tokenizer: With a chat template.
        worker: Writes the texts.
        limits: Of each request.
    """

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerBase, worker: Worker, limits: Limits) -> None:
        self._name, self._tokenizer, self._worker, self._limits = name, tokenizer, worker, limits
        self._tokens = TokenTexts(tokenizer)

    def app(self, *, local: bool) -> Starlette:
        """The application.

        Args:
            local: Whether only this machine is let in: then requests must name it as their host, so that no page in a
                browser reaches the model under a name of its own.
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
            exception_handlers={ApiError: _refused, HTTPException: _no_route, Exception: _failed},
        )

    async def _health(self, _: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def _model(self, request: Request) -> Response:
        self._known(request.path_params["name"])
        return JSONResponse(self._card())

    def _card(self) -> dict[str, Any]:
        return {"id": self._name, "object": "model", "owned_by": "hymba-tune", "max_model_len": self._limits.context}

    def _known(self, name: str) -> None:
        if name != self._name:
            raise ApiError(
                404, f"There is no model {name!r} here, only {self._name!r}.", param="model", code="model_not_found"
            )

    async def _body(self, request: Request) -> Any:
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise ApiError(415, "The body must be JSON, with Content-Type: application/json.")
        most, body = self._limits.body, bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in request.stream():
                    body += part
                    if len(body) > most:
                        raise ApiError(413, f"The body is larger than {most:,} bytes.", code="request_too_large")
            return json.loads(body)
        except TimeoutError:
            raise ApiError(408, f"The body did not come within {BODY_SECONDS} seconds.") from None
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"The body is not JSON: {error}.") from None

    async def _chat(self, request: Request) -> Response:
        asked = read_request(ChatRequest, await self._body(request))
        self._known(asked.model)
        try:
            messages = read_messages(list(asked.messages), {"developer": "system"})
            if messages[-1].role == "assistant":
                raise ApiError(400, "messages end with an answer; expected a question.", param="messages")
            prompt = encode_prompt(Conversation(tuple(messages)), self._tokenizer)
        except DataError as error:
            raise ApiError(400, f"messages: {error.what}.", param="messages") from None
        top = (asked.top_logprobs or 0) if asked.logprobs else None
        limit = asked.limit or min(self._limits.new_tokens, max(self._limits.context - len(prompt), 1))
        texts = self._texts(asked, [prompt], limit, top, goes_on=False)

        def choice(pieces: AnswerStream, streamed: bool) -> dict[str, Any]:
            told = pieces.next()
            scores = pieces.scores()
            said = {"role": "assistant", "content": told}
            return {
                "index": pieces.text.number,
                **({"delta": {"content": told} if told else {}} if streamed else {"message": said | {"refusal": None}}),
                "logprobs": chat_logprobs(scores, self._tokens) if top is not None else None,
                "finish_reason": pieces.ended,
            }

        begin = [
            {"index": i, "delta": {"role": "assistant", "content": ""}, "finish_reason": None} for i in range(asked.n)
        ]
        kind = "chat.completion.chunk" if asked.stream else "chat.completion"
        return await self._answer(
            request, asked, texts, head(kind, self._name), choice, len(prompt), begin, stripped=True
        )

    async def _complete(self, request: Request) -> Response:
        asked = read_request(CompletionRequest, await self._body(request))
        self._known(asked.model)
        prompts = [self._ids(prompt) for prompt in asked.prompts]
        if not prompts or not all(prompts):
            raise ApiError(400, "prompt: nothing to go on with.", param="prompt")
        scored = asked.prompt_logprobs is not None or (asked.echo and asked.logprobs is not None)
        if asked.stream and (asked.echo or scored):
            raise ApiError(400, "echo and prompt_logprobs cannot be streamed.", param="stream")
        if not asked.max_tokens and not (asked.echo or scored):
            raise ApiError(400, "max_tokens: 0 is for echo and prompt_logprobs.", param="max_tokens")
        texts = self._texts(asked, prompts, asked.max_tokens, asked.logprobs, goes_on=True)
        top = max(asked.prompt_logprobs or 0, asked.logprobs or 0)
        read = [await self._score(ids, top) for ids in prompts] if scored else None

        def choice(pieces: AnswerStream, streamed: bool) -> dict[str, Any]:
            told, scores = pieces.next(), pieces.scores()
            number = pieces.text.number
            before = read[number // asked.n] if read else None
            choice = {"index": number, "text": told, "logprobs": None, "finish_reason": pieces.ended or "length"}
            if streamed:
                choice["finish_reason"] = pieces.ended
            if asked.logprobs is not None or asked.echo:
                choice |= self._completion_scores(asked, pieces.text, told, scores, before)
            if asked.prompt_logprobs is not None and before is not None:
                choice["prompt_logprobs"] = prompt_logprobs(before, self._tokens)
            return choice

        count = sum(map(len, prompts))
        return await self._answer(
            request, asked, texts, head("text_completion", self._name), choice, count, [], stripped=False
        )

    def _completion_scores(
        self,
        asked: CompletionRequest,
        text: Writing,
        told: str,
        scores: Sequence[TokenScore],
        before: Sequence[TokenScore | None] | None,
    ) -> dict[str, Any]:
        """A completion's text and log-probabilities, those of an echoed prompt in front."""
        prompt = self._tokenizer.decode(text.prompt, skip_special_tokens=True) if asked.echo else ""
        if asked.logprobs is None:
            return {"text": prompt + told}
        shown = [*(before or [] if asked.echo else []), *scores]
        ids = [*(text.prompt if asked.echo else []), *(score.token for score in scores)]
        by_id = asked.return_tokens_as_token_ids
        return {"text": prompt + told, "logprobs": completion_logprobs(shown, ids, self._tokens, by_id=by_id)}

    def _ids(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            ids: list[int] = self._tokenizer(prompt)["input_ids"]
            return ids
        if not all(0 <= token < len(self._tokenizer) for token in prompt):
            raise ApiError(400, f"prompt: token ids lie in 0 to {len(self._tokenizer) - 1:,}.", param="prompt")
        return prompt

    def _texts(
        self, asked: BaseRequest, prompts: Sequence[list[int]], limit: int, top: int | None, *, goes_on: bool
    ) -> list[Writing]:
        if limit > self._limits.new_tokens:
            raise ApiError(400, f"max_tokens: at most {self._limits.new_tokens:,} here.", param="max_tokens")
        for prompt in prompts:
            if len(prompt) + limit > self._limits.context:
                raise ApiError(
                    400,
                    f"{len(prompt):,} tokens of prompt and {limit:,} of answer are more than the model's "
                    f"{self._limits.context:,}.",
                    param="messages" if isinstance(asked, ChatRequest) else "prompt",
                    code="context_length_exceeded",
                )
        choices = range(asked.n * len(prompts))
        return [
            Writing(
                prompts[number // asked.n],
                limit,
                Sampling(asked.temperature, asked.top_p, None if asked.seed is None else asked.seed % 2**62 + number),
                stop=tuple(asked.stop or ()),
                goes_on=goes_on,
                top=top,
                number=number,
            )
            for number in choices
        ]

    async def _score(self, ids: list[int], top: int) -> list[TokenScore | None]:
        with _full_queue_refused():
            scores = self._worker.call(lambda model: score_prompt(model, ids, top))
        result: list[TokenScore | None] = await asyncio.wrap_future(scores)
        return result

    async def _answer(
        self,
        request: Request,
        asked: BaseRequest,
        texts: list[Writing],
        begin: dict[str, Any],
        choice: Choice,
        prompts: int,
        opening: list[dict[str, Any]],
        *,
        stripped: bool,
    ) -> Response:
        pieces = [AnswerStream(text, self._tokenizer, stripped=stripped) for text in texts]
        if not texts[0].max_new_tokens:  # only the prompt was asked about
            return JSONResponse(begin | {"choices": [choice(p, False) for p in pieces], "usage": usage(prompts, texts)})
        changes = self._changes(texts)
        if asked.stream:
            await anext(changes)  # a full queue is said with a status
            counted = asked.stream_options is not None and asked.stream_options.include_usage
            return StreamingResponse(
                _stream(changes, pieces, begin, choice, opening, prompts if counted else None),
                media_type="text/event-stream",
                headers={"Cache-Control": "no-store"},
            )
        async for _ in changes:
            if await request.is_disconnected():
                await changes.aclose()
                return Response(status_code=499)  # nobody reads it
        return JSONResponse(begin | {"choices": [choice(p, False) for p in pieces], "usage": usage(prompts, texts)})

    async def _changes(self, texts: list[Writing]) -> AsyncGenerator[None, None]:
        """Comes back when the texts are taken on, and when they have changed; whoever stops listening stops them."""
        changed, loop = asyncio.Event(), asyncio.get_running_loop()

        def tell() -> None:
            with suppress(RuntimeError):  # the server has ended
                loop.call_soon_threadsafe(changed.set)

        job = Job(texts, tell)
        with _full_queue_refused():
            self._worker.submit(job)
        try:
            yield
            while not job.done:
                await changed.wait()
                changed.clear()
                if not job.error:
                    yield
            if job.error:  # perhaps from before the first look
                raise ApiError(500, f"The model failed: {job.error}", kind="server_error")
            yield  # of what came to an end while the last change was being told
        finally:
            if not job.done:
                self._worker.drop(job)


async def _stream(
    changes: AsyncGenerator[None, None],
    pieces: Sequence[AnswerStream],
    begin: dict[str, Any],
    choice: Choice,
    opening: list[dict[str, Any]],
    prompts: int | None,
) -> AsyncIterator[str]:
    """Server-sent events: what is new of each text, and last the tokens, if ``prompts`` says how many were read."""
    try:
        for first in opening:
            yield _event(begin | {"choices": [first]})
        going = list(pieces)
        async for _ in changes:
            for piece in going:
                told = choice(piece, True)
                if told.get("text") or told.get("delta") or told["logprobs"] or piece.ended:
                    yield _event(begin | {"choices": [told]})
            going = [piece for piece in going if not piece.ended]
        if prompts is not None:
            yield _event(begin | {"choices": [], "usage": usage(prompts, [piece.text for piece in pieces])})
        yield "data: [DONE]\n\n"
    except ApiError as error:  # too late for a status
        yield _event(error.body)
    finally:
        await changes.aclose()


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


@contextmanager
def _full_queue_refused() -> Iterator[None]:
    try:
        yield
    except QueueFullError:
        raise ApiError(
            429, "Too many texts wait; try again later.", kind="rate_limit_error", code="rate_limit_exceeded"
        ) from None


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, error.status, {"Retry-After": "1"} if error.status == 429 else None)


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    refused = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}.")
    return JSONResponse(refused.body, error.status_code, error.headers)


async def _failed(_: Request, error: Exception) -> Response:
    return JSONResponse(ApiError(500, type(error).__name__, kind="server_error").body, 500)

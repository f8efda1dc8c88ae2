"""One request and its response: receiving the body, server-sent events, errors, and clients that disconnect."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from hymba_tune.errors import HymbaTuneError
from hymba_tune.serve.requests import ApiError
from hymba_tune.serve.responses import AnswerStream, usage
from hymba_tune.serve.worker import QueueFullError, StoppedError

BODY_SECONDS = 30
"""Time limit for receiving a request's body, in seconds."""
CLOSING = (408, 413)
"""Statuses of responses to requests whose body may not be received completely: the connection ends with them."""
Choice = Callable[[AnswerStream, bool], dict[str, Any]]
"""Builds a response's choice from a generation; if the flag is set, a chunk with only what is new."""


class KeyCheck:
    """Refuses requests without the key; only whether the server lives is public.

    Args:
        app: The application behind it.
        key: The key that the ``Authorization`` header must have, as a bearer token.
    """

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app = app
        self._expected = f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        given = Headers(scope=scope).get("authorization", "").encode()
        if scope["path"] == "/health" or hmac.compare_digest(given, self._expected):
            await self._app(scope, receive, send)
            return
        error = ApiError(401, "The API key is missing or wrong.", code="invalid_api_key")
        # The connection stays open for the body: a client that still sends it to a closed one reads no response.
        await JSONResponse(error.body, error.status, {"WWW-Authenticate": "Bearer"})(scope, receive, send)


async def read_body(request: Request, limit: int) -> bytes:
    """Receive the JSON body of a request.

    Args:
        request: The request.
        limit: Maximum size of the body, in bytes.

    Raises:
        ApiError: If the body is too large or too slow, or not said to be JSON.
    """
    too_large = ApiError(413, f"The body is larger than {limit:,} bytes.", code="request_too_large")
    headers = request.headers
    length = headers.get("content-length", "0")
    size = int(length) if length.isascii() and length.isdigit() else 0
    if size > limit and headers.get("expect", "").lower() == "100-continue":
        raise too_large  # the client waits before it sends the body

    body, received = bytearray(), 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            # A body that is too large is received all the same: many clients read no response before they have sent it.
            async for part in request.stream():
                received += len(part)
                if max(received, size) <= limit:
                    body += part
                else:
                    body.clear()
    except TimeoutError:
        if max(received, size) <= limit:
            raise ApiError(408, f"The body did not arrive within {BODY_SECONDS} seconds.") from None
    if max(received, size) > limit:
        raise too_large
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "The body must be JSON, with Content-Type: application/json.")
    return bytes(body)


async def while_connected(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """Run ``work`` to its end, or cancel it as soon as the client closes the connection."""
    working = asyncio.create_task(work)
    waiting = asyncio.create_task(_disconnect(request))
    try:
        await asyncio.wait([working, waiting], return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else await disconnected(request)
    finally:
        for task in (working, waiting):
            task.cancel()
        await asyncio.wait([working, waiting])


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def drain(changes: AsyncGenerator[None, None]) -> None:
    """Wait until generations are finished.

    Args:
        changes: Yields after each change of a generation.
    """
    async with aclosing(changes):
        async for _ in changes:
            pass


async def stream_events(
    changes: AsyncGenerator[None, None],
    streams: Sequence[AnswerStream],
    begin: dict[str, Any],
    choice: Choice,
    first_chunks: list[dict[str, Any]],
    prompt_tokens: int | None,
) -> AsyncIterator[str]:
    """Yield server-sent events: what is new of each generation, and at the end the usage.

    Args:
        changes: Yields after each change of a generation.
        streams: The generations.
        begin: The fields that every event starts with.
        choice: Builds the choice of an event.
        first_chunks: The choices of the first events.
        prompt_tokens: The number of prompt tokens in the usage; None sends no usage.
    """
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


def full_queue() -> ApiError:
    """The error for a request that the queue has no room for."""
    return ApiError(429, "The queue is full; try again later.", kind="rate_limit_error", code="rate_limit_exceeded")


@contextmanager
def worker_errors() -> Iterator[None]:
    """Turn the errors of the worker and of the model into responses."""
    try:
        yield
    except QueueFullError:
        raise full_queue() from None
    except StoppedError:
        raise ApiError(503, "The server is shutting down.", kind="server_error", code="server_shutting_down") from None
    except Exception as error:
        what = error.what if isinstance(error, HymbaTuneError) else f"{type(error).__name__}: {error}"
        raise ApiError(500, f"The model failed: {what}", kind="server_error") from None


async def handle_api_error(_: Request, error: Exception) -> Response:
    """The response to a request with an error."""
    assert isinstance(error, ApiError)
    headers = {"Retry-After": "1"} if error.status == 429 else {}
    headers |= {"Connection": "close"} if error.status in CLOSING else {}
    return JSONResponse(error.body, error.status, headers)


async def handle_http_error(request: Request, error: Exception) -> Response:
    """The response to a request for a route or a method that does not exist."""
    assert isinstance(error, HTTPException)
    body = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}.").body
    return JSONResponse(body, error.status_code, error.headers)


async def handle_internal_error(_: Request, error: Exception) -> Response:
    """The response to a request that found a mistake in this package."""
    return JSONResponse(ApiError(500, type(error).__name__, kind="server_error").body, 500)


async def disconnected(*_: object) -> Response:
    """The response to a client that has closed the connection, which receives nothing."""
    return Response(status_code=499)

"""Counts and times of a server, in Prometheus' text format."""

from __future__ import annotations

import time
from collections.abc import Iterable

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hymba_tune.generate import Generation

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0)
"""Upper bounds of the buckets of times."""


class ServerMetrics:
    """What has happened on a server; each server has its own."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "hymba_requests", "Responses by route and status.", ["route", "status"], registry=registry
        )
        self._texts = Counter("hymba_texts", "Texts by how they ended.", ["finish_reason"], registry=registry)
        self._prompt_tokens = Counter("hymba_prompt_tokens", "Prompt tokens, reused ones included.", registry=registry)
        self._reused_tokens = Counter("hymba_reused_prompt_tokens", "Prompt tokens not computed.", registry=registry)
        self._new_tokens = Counter("hymba_generated_tokens", "Generated tokens.", registry=registry)

        def times(name: str, description: str) -> Histogram:
            return Histogram(f"hymba_{name}_seconds", description, registry=registry, buckets=SECONDS)

        def gauge(name: str, description: str) -> Gauge:
            return Gauge(f"hymba_{name}", description, registry=registry)

        self._first = times("time_to_first_token", "From a request to the first token of a text.")
        self._whole = times("text", "From a request to the end of a text.")
        self._step = times("step", "One token of each running text, and a chunk of prompts.")
        self.running = gauge("running_texts", "Texts in the batch.")
        self.waiting = gauge("waiting_texts", "Texts that wait for the batch.")
        self.cache = gauge("cache_bytes", "Keys and states of running texts.")
        self.cache_limit = gauge("cache_limit_bytes", "The most that the keys and states of running texts may take.")
        self.prefixes = gauge("prefix_bytes", "Keys and states that are kept for reuse.")
        self._submitted: dict[Generation, float] = {}
        self._begun: set[Generation] = set()

    def submitted(self, generations: Iterable[Generation]) -> None:
        """Note that texts were requested."""
        self._submitted.update(dict.fromkeys(generations, time.monotonic()))

    def stepped(self, generations: Iterable[Generation], seconds: float) -> None:
        """Note a step of some texts."""
        self._step.observe(seconds)
        for one in generations:
            if one.ids and one in self._submitted and one not in self._begun:
                self._begun.add(one)
                self._first.observe(time.monotonic() - self._submitted[one])

    def ended(self, generation: Generation, reason: str) -> None:
        """Note that a text has ended, for whatever reason."""
        submitted = self._submitted.pop(generation, None)
        if submitted is None:
            return
        self._begun.discard(generation)
        self._texts.labels(reason).inc()
        self._whole.observe(time.monotonic() - submitted)
        self._prompt_tokens.inc(len(generation.prompt))
        self._reused_tokens.inc(generation.reused)
        self._new_tokens.inc(len(generation.ids))

    def response(self) -> Response:
        """All metrics."""
        return Response(generate_latest(self._registry), headers={"Content-Type": CONTENT_TYPE_LATEST})


class RequestCounter:
    """Counts the responses to requests.

    Args:
        app: The application behind it.
        metrics: Where they are counted.
        routes: The paths that are counted by name; others may be anything that a client sends.
    """

    def __init__(self, app: ASGIApp, metrics: ServerMetrics, routes: frozenset[str]) -> None:
        self._app = app
        self._metrics = metrics
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        route = scope["path"] if scope["path"] in self._routes else "other"

        async def count(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.requests.labels(route, str(message["status"])).inc()
            await send(message)

        await self._app(scope, receive, count)

"""The connections of clients: idle, stuck and abandoned ones are closed, and shutting down ends every request."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

IDLE_SECONDS = 10
"""Time limit for the head of a connection's first request, in seconds."""
STUCK_SECONDS = 60
"""Time limit for a client to read what was sent to it, in seconds."""
PROBE_SECONDS = 5
"""Time between checks whether a client that has stopped sending still reads, in seconds."""


class Connection(H11Protocol):
    """A connection of a client, which is closed as soon as it is of no use.

    uvicorn itself only closes a connection that sends nothing at all after a response.
    """

    _probe_timer: asyncio.TimerHandle | None = None
    _stuck_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start to wait for the first request."""
        super().connection_made(transport)
        self.timeout_keep_alive_task = self.loop.call_later(IDLE_SECONDS, self.timeout_keep_alive_handler)

    def data_received(self, data: bytes) -> None:
        """Handle received data; a part of a request's head does not extend the time for the whole head."""
        timer = self.timeout_keep_alive_task
        super().data_received(data)
        if timer and self._is_idle and not self.transport.is_closing():
            self.timeout_keep_alive_task = self.loop.call_at(timer.when(), self.timeout_keep_alive_handler)

    def eof_received(self) -> bool:  # type: ignore[override]
        """Keep the connection open for the response if the client has sent a whole request."""
        if self._is_idle or self.cycle.more_body:
            return False
        self.cycle.keep_alive = False
        self._probe_timer = self.loop.call_later(PROBE_SECONDS, self._probe)
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop all timers."""
        for timer in (self._probe_timer, self._stuck_timer):
            if timer:
                timer.cancel()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Stop to send while the client does not read, and close the connection if it does not begin to."""
        super().pause_writing()
        self._stuck_timer = self.loop.call_later(STUCK_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """Continue to send."""
        super().resume_writing()
        if self._stuck_timer:
            self._stuck_timer.cancel()

    @property
    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _probe(self) -> None:
        """Send an interim response, which clients ignore; sending the second one fails if the client is gone.

        A client that has closed the connection looks like one that has only stopped sending until it is written to.
        """
        if self.transport.is_closing() or self.cycle.response_started or self.cycle.scope["http_version"] != "1.1":
            return  # a response that has started is its own probe
        self.transport.write(self.conn.send(h11.InformationalResponse(status_code=100, headers=[])))
        self._probe_timer = self.loop.call_later(PROBE_SECONDS, self._probe)


class HttpServer(uvicorn.Server):
    """uvicorn's server, which ends all requests when it shuts down.

    Args:
        config: uvicorn's settings.
        end_requests: Called first when the server shuts down; must give every request an error response.
    """

    def __init__(self, config: uvicorn.Config, end_requests: Callable[[], None]) -> None:
        super().__init__(config)
        self._end_requests = end_requests

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End all requests, and wait until their responses are sent."""
        self._end_requests()
        await super().shutdown(sockets)

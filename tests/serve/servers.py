"""Servers in this process, and requests that OpenAI's client would not send."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hymba_tune.config import ServeConfig
from hymba_tune.serve import Server

QUESTION = [{"role": "user", "content": "I see two cats. What do I see?"}]


@contextmanager
def working(_: str) -> Iterator[Any]:
    yield lambda _: None


@contextmanager
def serving(model: Path, **settings: Any) -> Iterator[Server]:
    usual: dict[str, Any] = {"model": str(model), "dtype": "float32", "port": 0, "max_new_tokens": 400, "max_body": 64}
    server = Server(ServeConfig(**usual | settings), working)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join()


def raw(server: Server, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, Any]:
    """Sends a request that OpenAI's client would not send."""
    connection = http.client.HTTPConnection(*address(server), timeout=60)
    connection.request(method, path, body, {"Content-Type": "application/json", **headers})
    response = connection.getresponse()
    text = response.read()
    connection.close()
    return response.status, json.loads(text) if text.startswith(b"{") else text.decode()


def address(server: Server) -> tuple[str, int]:
    host, port = server.url.removeprefix("http://").removesuffix("/v1").split(":")
    return host, int(port)


def connected(server: Server) -> socket.socket:
    return socket.create_connection(address(server), timeout=60)


def chat(server: Server, **fields: Any) -> bytes:
    """A whole request for an answer of two tokens."""
    body = json.dumps({"model": server.name, "messages": QUESTION, "max_tokens": 2, "temperature": 0, **fields})
    return request_head(len(body)) + body.encode()


def request_head(length: int, *lines: str) -> bytes:
    """The head of a request with a body of ``length`` bytes."""
    head = [
        "POST /v1/chat/completions HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {length}",
        *lines,
    ]
    return "\r\n".join([*head, "", ""]).encode()


def received(client: socket.socket) -> bytes:
    """All that a server sends until it closes the connection."""
    parts = []
    while part := client.recv(65536):
        parts.append(part)
    return b"".join(parts)


def wait_until_free(server: Server) -> None:
    """Waits until the model has nothing to do."""
    deadline = time.monotonic() + 120
    while server.worker.busy and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not server.worker.busy

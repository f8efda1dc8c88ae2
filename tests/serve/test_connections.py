"""Connections that are idle, stuck, half-closed or abandoned, and the errors they get when the server stops."""

from __future__ import annotations

import json
import logging
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from hymba_tune.serve import Server, connections
from tests.serve.servers import address, chat, connected, received, request_head, serving, wait_until_free

LONG = {"max_tokens": 400, "stop": ["never"]}


def status(response: bytes) -> int:
    return int(response.split(b" ", 2)[1])


@pytest.mark.parametrize("sent", [b"", b"POST /v1/chat/completions HTTP/1.1\r\nHost: loc"])
def test_an_idle_connection_is_closed(server: Server, monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    monkeypatch.setattr(connections, "IDLE_SECONDS", 0.1)
    with connected(server) as client:
        client.sendall(sent)
        assert received(client) == b""


def test_a_head_sent_byte_by_byte_does_not_extend_the_time(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "IDLE_SECONDS", 0.2)
    with connected(server) as client:
        client.settimeout(0.02)
        sent = 0
        for sent in range(1000):  # noqa: B007
            try:
                client.sendall(b"G")
                if not client.recv(1):
                    break
            except TimeoutError:
                continue
            except OSError:
                break
        assert 1 < sent < 999


def test_a_client_that_stops_sending_gets_its_response(server: Server) -> None:
    with connected(server) as client:
        client.sendall(chat(server))
        client.shutdown(socket.SHUT_WR)
        response = received(client)
    assert status(response) == 200
    assert json.loads(response.partition(b"\r\n\r\n")[2])["choices"][0]["finish_reason"] == "length"


def test_a_client_that_stops_sending_gets_its_stream(server: Server) -> None:
    with connected(server) as client:
        client.sendall(chat(server, stream=True))
        client.shutdown(socket.SHUT_WR)
        assert b"data: [DONE]" in received(client)


@pytest.mark.parametrize("fields", [{}, {"stream": True}])
def test_an_abandoned_request_frees_its_place(
    small_model: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]
) -> None:
    """The abandoned request waits in the queue, so that nothing is generated for it that would show it to be gone."""
    monkeypatch.setattr(connections, "PROBE_SECONDS", 0.02)
    with serving(small_model, batch_size=1, queue=1) as server, connected(server) as first:
        first.sendall(chat(server, **LONG, stream=True))
        first.recv(1)
        with connected(server) as second:
            second.sendall(chat(server, **LONG, **fields))
            if fields:
                second.recv(1)
        first.close()
        wait_until_free(server)
        assert server.worker.largest_batch == 1


def test_a_client_that_reads_nothing_is_disconnected(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "STUCK_SECONDS", 0.05)
    closed: list[object] = []
    lost = connections.Connection.connection_lost
    monkeypatch.setattr(
        connections.Connection, "connection_lost", lambda self, error: (closed.append(error), lost(self, error))
    )
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        client.connect(address(server))
        body = json.dumps(
            {"model": server.name, "prompt": "a b " * 90, "echo": True, "max_tokens": 0, "logprobs": 128, "n": 16}
        ).encode()
        client.sendall(request_head(len(body)).replace(b"chat/", b"") + body)
        deadline = time.monotonic() + 60
        while not closed and time.monotonic() < deadline:
            time.sleep(0.02)
        assert closed


def test_a_body_that_is_too_large_gets_413_also_from_a_server_that_closes(server: Server) -> None:
    """A response before the whole body is received would end in a reset connection."""
    size = 5_000_000
    with connected(server) as client:
        client.sendall(request_head(size, "Connection: close") + b"a" * size)
        response = received(client)
    assert status(response) == 413
    assert b"The body is larger than 65,536 bytes" in response


def test_a_client_that_waits_to_send_a_large_body_need_not_send_it(server: Server) -> None:
    with connected(server) as client:
        client.sendall(request_head(5_000_000, "Expect: 100-continue"))
        assert status(received(client)) == 413


def test_a_client_that_leaves_amid_its_body_is_no_error(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), connected(server) as client:
        client.sendall(request_head(1000) + b"{")
        client.shutdown(socket.SHUT_WR)
        assert received(client) == b""
    assert not caplog.records


def test_stopping_ends_every_request_with_an_error(small_model: Path) -> None:
    with serving(small_model, batch_size=1) as server, connected(server) as stream, connected(server) as whole:
        stream.sendall(chat(server, **LONG, stream=True))
        stream.recv(1)
        whole.sendall(chat(server, **LONG))
        while len(server.worker._jobs) < 2:
            pass
        server.stop()
        streamed, response = received(stream), received(whole)
    event = json.loads(streamed.rstrip(b"0\r\n").rpartition(b"data: ")[2])
    assert event["error"]["message"] == "The server is shutting down."
    assert status(response) == 503
    assert b"The server is shutting down." in response

"""Who may use the server: the key, browsers of other pages, and the model's name."""

from __future__ import annotations

import http.client
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from pydantic import ValidationError

from hymba_tune.config import ServeConfig
from hymba_tune.errors import ConfigError
from hymba_tune.serve import Server
from tests.serve.servers import QUESTION, address, connected, raw, received, request_head, serving, working

KEY = "sk-never-printed"
PAGE = "https://chat.example.com"


@pytest.fixture(scope="module")
def locked(small_model: Path) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SERVE_KEY", KEY)
        with serving(small_model, api_key="SERVE_KEY", cors=[PAGE]) as server:
            yield server


def test_requests_need_the_key(locked: Server) -> None:
    with openai.OpenAI(base_url=locked.url, api_key=KEY, max_retries=0) as client:
        settings = {"model": locked.name, "messages": QUESTION, "max_tokens": 1}
        assert client.chat.completions.create(**settings).choices  # type: ignore[call-overload]
        with pytest.raises(openai.AuthenticationError, match="The API key is missing or wrong") as caught:
            client.with_options(api_key="other").chat.completions.create(**settings)  # type: ignore[call-overload]
    assert caught.value.code == "invalid_api_key"
    assert KEY not in str(caught.value)
    assert raw(locked, "GET", "/v1/models")[0] == raw(locked, "GET", "/v1/models", Authorization="é")[0] == 401
    assert raw(locked, "GET", "/health") == (200, {"status": "ok"})


def test_a_body_that_follows_the_refusal_does_not_hide_it(locked: Server) -> None:
    with connected(locked) as client:
        client.sendall(request_head(10))
        assert client.recv(12) == b"HTTP/1.1 401"
        client.sendall(b"a" * 10 + b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert b"HTTP/1.1 200" in received(client)


def test_pages_of_the_given_origin_may_read_responses(locked: Server) -> None:
    def asked(origin: str, method: str = "OPTIONS") -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection(*address(locked), timeout=60)
        wanted = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        connection.request(method, "/v1/models", headers={"Origin": origin, **wanted})
        response = connection.getresponse()
        response.read()
        connection.close()
        return response

    assert asked(PAGE).headers["Access-Control-Allow-Origin"] == PAGE
    assert asked(PAGE, "GET").headers["Access-Control-Allow-Origin"] == PAGE
    assert asked("https://evil.example").headers["Access-Control-Allow-Origin"] is None


@pytest.mark.parametrize("origin", ["chat.example.com", "https://chat.example.com/", "null"])
def test_an_origin_has_no_path(origin: str) -> None:
    with pytest.raises(ValidationError, match="String should match pattern"):
        ServeConfig(cors=[origin])


def test_a_key_that_is_not_there_is_not_repeated(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMPTY", "")
    for name in ("EMPTY", KEY):
        with pytest.raises(ConfigError, match="--api-key: there is no environment variable of this name") as caught:
            Server(ServeConfig(model=str(small_model), api_key=name), working)
        assert name not in str(caught.value)


def test_a_model_is_named_without_its_path(locked: Server, small_model: Path) -> None:
    assert locked.name == small_model.name
    _, cards = raw(locked, "GET", "/v1/models", Authorization=f"Bearer {KEY}")
    assert cards["data"][0]["id"] == small_model.name
    assert isinstance(cards["data"][0]["created"], int)

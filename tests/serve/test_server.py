"""The server, asked over a real socket by OpenAI's own client."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from hymba_tune.checkpoint import load_tokenizer, load_weights
from hymba_tune.config import ServeConfig
from hymba_tune.data import Conversation, Message, encode_prompt
from hymba_tune.errors import ConfigError
from hymba_tune.generate import answer
from hymba_tune.registry import resolve_model
from hymba_tune.serve import Server

ASKED = [{"role": "user", "content": "I see two cats. What do I see?"}]
PROMPT = "I see two"
LONG = [{"role": "user", "content": "a b " * 90}]


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


@pytest.fixture(scope="module")
def server(small_model: Path) -> Iterator[Server]:
    with serving(small_model) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=300) as made:
        yield made


@pytest.fixture(scope="module")
def name(server: Server) -> str:
    return server.name


@pytest.fixture(scope="module")
def model(small_model: Path) -> Any:
    return load_weights(resolve_model(str(small_model)), dtype=torch.float32, device=torch.device("cpu")).eval()


@pytest.fixture(scope="module")
def tokenizer(small_model: Path) -> Any:
    return load_tokenizer(small_model)


def raw(server: Server, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, Any]:
    """A request that no client of good manners would send."""
    host, port = server.url.removeprefix("http://").removesuffix("/v1").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=60)
    connection.request(method, path, body, {"Content-Type": "application/json", **headers})
    answered = connection.getresponse()
    text = answered.read()
    connection.close()
    return answered.status, json.loads(text) if text.startswith(b"{") else text.decode()


def test_chat_answers_as_the_model_does(client: openai.OpenAI, name: str, model: Any, tokenizer: Any) -> None:
    expected = answer(
        model, tokenizer, Conversation((Message("user", ASKED[0]["content"]),)), max_new_tokens=12, temperature=0
    )
    said = client.chat.completions.create(model=name, messages=ASKED, max_tokens=12, temperature=0)  # type: ignore[arg-type]
    assert said.choices[0].message.content == expected
    assert said.choices[0].finish_reason == "length"
    assert said.usage is not None
    assert said.usage.completion_tokens == 12
    assert said.usage.prompt_tokens == len(
        encode_prompt(Conversation((Message("user", ASKED[0]["content"]),)), tokenizer)
    )


def test_streamed_pieces_make_the_whole(client: openai.OpenAI, name: str) -> None:
    settings: dict[str, Any] = {"model": name, "messages": ASKED, "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**settings).choices[0]
    chunks = list(client.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert "".join(pieces) == whole.message.content
    assert len(pieces) > 2
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["length"]
    assert chunks[-1].usage.completion_tokens == 12


def test_completion_goes_on_with_the_prompt(client: openai.OpenAI, name: str, model: Any, tokenizer: Any) -> None:
    ids = tokenizer(PROMPT)["input_ids"]
    written = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0].tolist()
    whole = tokenizer.decode(written, skip_special_tokens=True)
    settings: dict[str, Any] = {"model": name, "max_tokens": 8, "temperature": 0}
    for prompt in (PROMPT, ids):
        said = client.completions.create(prompt=prompt, **settings).choices[0].text
        assert PROMPT + said == whole
    streamed = client.completions.create(prompt=PROMPT, **settings, stream=True)
    assert PROMPT + "".join(chunk.choices[0].text for chunk in streamed) == whole
    assert client.completions.create(prompt=PROMPT, **settings, echo=True).choices[0].text == whole


def test_several_requests_are_written_together(server: Server, client: openai.OpenAI, name: str) -> None:
    settings: dict[str, Any] = {"model": name, "messages": ASKED, "max_tokens": 40, "temperature": 0}
    alone = client.chat.completions.create(**settings).choices[0].message.content
    server.worker.most_at_once = 0
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: client.chat.completions.create(**settings), range(4)))
    assert server.worker.most_at_once > 1
    assert {said.choices[0].message.content for said in answers} == {alone}


def test_several_prompts_and_choices(client: openai.OpenAI, name: str) -> None:
    said = client.completions.create(model=name, prompt=["One", "Two"], n=2, max_tokens=3, seed=5, temperature=2.0)
    assert [choice.index for choice in said.choices] == [0, 1, 2, 3]
    again = client.completions.create(model=name, prompt=["One", "Two"], n=2, max_tokens=3, seed=5, temperature=2.0)
    texts = [choice.text for choice in said.choices]
    assert texts == [choice.text for choice in again.choices]
    assert texts[0] != texts[1]


def test_stop_strings_end_and_are_not_shown(client: openai.OpenAI, name: str) -> None:
    settings: dict[str, Any] = {"model": name, "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(**settings).choices[0].text
    stop = whole[4:7]
    cut = whole[: whole.find(stop)]
    said = client.completions.create(**settings, stop=stop).choices[0]
    assert (said.text, said.finish_reason) == (cut, "stop")
    chunks = list(client.completions.create(**settings, stop=["never", stop], stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == cut
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_log_probabilities(client: openai.OpenAI, name: str, model: Any, tokenizer: Any) -> None:
    ids = tokenizer(PROMPT)["input_ids"]
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    settings: dict[str, Any] = {"model": name, "temperature": 0}
    said = client.completions.create(prompt=PROMPT, max_tokens=2, logprobs=3, echo=True, **settings).choices[0]
    assert said.logprobs is not None
    assert said.logprobs.token_logprobs[0] is None  # type: ignore[index]
    for place, token in enumerate(ids[1:], start=1):
        assert said.logprobs.token_logprobs[place] == pytest.approx(float(expected[place - 1, token]), abs=1e-4)  # type: ignore[index]
        assert max(said.logprobs.top_logprobs[place].values()) == pytest.approx(
            float(expected[place - 1].max()), abs=1e-4
        )  # type: ignore[index]
    assert len(said.logprobs.tokens) == len(ids) + 2  # type: ignore[arg-type]
    assert said.logprobs.tokens[-1] in said.logprobs.top_logprobs[-1]  # type: ignore[index, operator]
    by_id = client.completions.create(
        prompt=ids,
        max_tokens=0,
        extra_body={"prompt_logprobs": 2, "return_tokens_as_token_ids": True},
        **settings,
    ).choices[0]
    told = by_id.model_extra["prompt_logprobs"]  # type: ignore[index]
    assert told[0] is None
    assert told[1][str(ids[1])]["logprob"] == pytest.approx(float(expected[0, ids[1]]), abs=1e-4)
    assert [entry["rank"] for entry in list(told[1].values())[-2:]] == [1, 2]
    chat = client.chat.completions.create(messages=ASKED, max_tokens=3, logprobs=True, top_logprobs=2, **settings)  # type: ignore[arg-type]
    content = chat.choices[0].logprobs.content  # type: ignore[union-attr]
    assert len(content) == 3  # type: ignore[arg-type]
    assert content[0].top_logprobs[0].logprob == content[0].logprob  # type: ignore[index]


def test_models_are_listed(client: openai.OpenAI, name: str, server: Server) -> None:
    assert [found.id for found in client.models.list()] == [name]
    assert client.models.retrieve(name).id == name
    assert raw(server, "GET", "/health") == (200, {"status": "ok"})


@pytest.mark.parametrize(
    ("changes", "kind", "said"),
    [
        ({"model": "other"}, openai.NotFoundError, "There is no model 'other' here"),
        ({"messages": []}, openai.BadRequestError, "messages: List should have at least 1 item"),
        ({"messages": [{"role": "bot", "content": "a"}]}, openai.BadRequestError, 'message 1 has role "bot"'),
        ({"messages": [*ASKED, {"role": "assistant", "content": "a"}]}, openai.BadRequestError, "end with an answer"),
        ({"temperature": -1}, openai.BadRequestError, "temperature: Input should be greater than or equal to 0"),
        ({"max_tokens": 401}, openai.BadRequestError, "max_tokens: at most 400 here"),
        ({"max_tokens": 400, "messages": LONG}, openai.BadRequestError, "of answer are more than the model's 512"),
        ({"tools": [{"type": "function"}]}, openai.BadRequestError, "tools is not supported here"),
        ({"n": 99}, openai.BadRequestError, "n: Input should be less than or equal to 16"),
    ],
)  # fmt: skip
def test_errors_are_openais(
    client: openai.OpenAI, name: str, changes: dict[str, Any], kind: type[openai.APIStatusError], said: str
) -> None:
    with pytest.raises(kind) as caught:
        client.chat.completions.create(**{"model": name, "messages": ASKED} | changes)
    assert said in caught.value.message
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompt": []}, "prompt: nothing to go on with"),
        ({"prompt": [[9999]]}, "prompt: token ids lie in 0 to"),
        ({"max_tokens": 0}, "0 is for echo and prompt_logprobs"),
        ({"echo": True, "stream": True}, "cannot be streamed"),
    ],
)
def test_completions_are_checked(client: openai.OpenAI, name: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(openai.BadRequestError, match=said):
        client.completions.create(**{"model": name, "prompt": PROMPT} | changes)


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status"),
    [
        ("POST", "/v1/completions", b"{}", {"Content-Type": "text/plain"}, 415),
        ("POST", "/v1/completions", b"{", {}, 400),
        ("POST", "/v1/completions", b"[" * 50_000, {}, 400),
        ("POST", "/v1/completions", b'"' + b"a" * 65 * 1024 + b'"', {}, 413),
        ("POST", "/v1/nothing", b"{}", {}, 404),
        ("GET", "/v1/completions", b"", {}, 405),
    ],
)
def test_malformed_requests_are_refused(
    server: Server, method: str, path: str, body: bytes, headers: dict[str, str], status: int
) -> None:
    found, told = raw(server, method, path, body, **headers)
    assert found == status
    assert told["error"]["type"] == "invalid_request_error"


def test_pages_under_other_names_are_kept_out(server: Server) -> None:
    """A page in a browser could otherwise reach the model by a name of its own that leads to this machine."""
    assert raw(server, "GET", "/v1/models", Host="evil.example")[0] == 400


def test_a_full_queue_is_said_and_whoever_leaves_makes_room(small_model: Path) -> None:
    with (
        serving(small_model, batch_size=1, queue=1) as server,
        openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=300) as client,
    ):
        long: dict[str, Any] = {"model": server.name, "prompt": PROMPT, "max_tokens": 400, "stream": True}
        first = client.completions.create(**long, logit_bias={})
        next(iter(first))
        second = client.completions.create(**long)
        with pytest.raises(openai.RateLimitError, match="Too many texts wait"):
            client.completions.create(model=server.name, prompt=PROMPT, max_tokens=1)
        second.close()
        first.close()
        until = time.monotonic() + 120
        while server.worker.busy and time.monotonic() < until:
            time.sleep(0.02)
        assert client.completions.create(model=server.name, prompt=PROMPT, max_tokens=1).choices[0].finish_reason
        assert server.worker.most_at_once == 1


def test_a_model_that_fails_is_said_and_goes_on(
    client: openai.OpenAI, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr("hymba_tune.generate.decoding.Decoder.add", fail)
        with pytest.raises(openai.InternalServerError, match="The model failed: RuntimeError: out of memory"):
            client.completions.create(model=name, prompt=PROMPT, max_tokens=2)
    assert client.completions.create(model=name, prompt=PROMPT, max_tokens=2).choices


def test_a_taken_port_is_said_before_the_weights_load(small_model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--port {port}: cannot listen there: Address already in use"):
            Server(ServeConfig(model=str(small_model), port=port), working)

"""The server, over a real socket, with OpenAI's own client."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
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
from tests.serve.servers import QUESTION, raw, serving, wait_until_free, working

ANSWER = {"role": "assistant", "content": "You see two cats."}
PROMPT = "I see two"
LONG = [{"role": "user", "content": "a b " * 90}]


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=300) as client:
        yield client


@pytest.fixture(scope="module")
def name(server: Server) -> str:
    return server.name


@pytest.fixture(scope="module")
def model(small_model: Path) -> Any:
    return load_weights(resolve_model(str(small_model)), dtype=torch.float32, device=torch.device("cpu")).eval()


@pytest.fixture(scope="module")
def tokenizer(small_model: Path) -> Any:
    return load_tokenizer(small_model)


def test_chat_completion_is_the_models_answer(client: openai.OpenAI, name: str, model: Any, tokenizer: Any) -> None:
    conversation = Conversation((Message("user", QUESTION[0]["content"]),))
    expected = answer(model, tokenizer, conversation, max_new_tokens=12, temperature=0)
    response = client.chat.completions.create(model=name, messages=QUESTION, max_tokens=12, temperature=0)  # type: ignore[arg-type]
    assert response.choices[0].message.content == expected
    assert response.choices[0].finish_reason == "length"
    assert response.usage is not None
    assert response.usage.completion_tokens == 12
    assert response.usage.prompt_tokens == len(encode_prompt(conversation, tokenizer))


def test_streamed_chunks_join_to_the_whole_answer(client: openai.OpenAI, name: str) -> None:
    settings: dict[str, Any] = {"model": name, "messages": QUESTION, "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**settings).choices[0]
    chunks = list(client.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    parts = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert "".join(parts) == whole.message.content
    assert len(parts) > 2
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["length"]
    assert chunks[-1].usage.completion_tokens == 12


def test_completion_continues_the_prompt(client: openai.OpenAI, name: str, model: Any, tokenizer: Any) -> None:
    ids = tokenizer(PROMPT)["input_ids"]
    generated = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0].tolist()
    whole = tokenizer.decode(generated, skip_special_tokens=True)
    settings: dict[str, Any] = {"model": name, "max_tokens": 8, "temperature": 0}
    for prompt in (PROMPT, ids):
        text = client.completions.create(prompt=prompt, **settings).choices[0].text
        assert PROMPT + text == whole
    streamed = client.completions.create(prompt=PROMPT, **settings, stream=True)
    assert PROMPT + "".join(chunk.choices[0].text for chunk in streamed) == whole
    assert client.completions.create(prompt=PROMPT, **settings, echo=True).choices[0].text == whole


def test_several_requests_share_a_batch(server: Server, client: openai.OpenAI, name: str) -> None:
    settings: dict[str, Any] = {"model": name, "messages": QUESTION, "max_tokens": 40, "temperature": 0}
    alone = client.chat.completions.create(**settings).choices[0].message.content
    server.worker.largest_batch = 0
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: client.chat.completions.create(**settings), range(4)))
    assert server.worker.largest_batch > 1
    assert {one.choices[0].message.content for one in answers} == {alone}


def test_several_prompts_and_choices(client: openai.OpenAI, name: str) -> None:
    response = client.completions.create(model=name, prompt=["One", "Two"], n=2, max_tokens=3, seed=5, temperature=2.0)
    assert [choice.index for choice in response.choices] == [0, 1, 2, 3]
    again = client.completions.create(model=name, prompt=["One", "Two"], n=2, max_tokens=3, seed=5, temperature=2.0)
    texts = [choice.text for choice in response.choices]
    assert texts == [choice.text for choice in again.choices]
    assert texts[0] != texts[1]


def test_stop_strings_end_the_text_and_are_not_part_of_it(client: openai.OpenAI, name: str) -> None:
    settings: dict[str, Any] = {"model": name, "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(**settings).choices[0].text
    stop = whole[4:7]
    cut = whole[: whole.find(stop)]
    choice = client.completions.create(**settings, stop=stop).choices[0]
    assert (choice.text, choice.finish_reason) == (cut, "stop")
    chunks = list(client.completions.create(**settings, stop=["never", stop], stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == cut
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_log_probabilities(client: openai.OpenAI, name: str, model: Any, tokenizer: Any) -> None:
    ids = tokenizer(PROMPT)["input_ids"]
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    settings: dict[str, Any] = {"model": name, "temperature": 0}
    choice = client.completions.create(prompt=PROMPT, max_tokens=2, logprobs=3, echo=True, **settings).choices[0]
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs[0] is None  # type: ignore[index]
    for place, token in enumerate(ids[1:], start=1):
        assert choice.logprobs.token_logprobs[place] == pytest.approx(float(expected[place - 1, token]), abs=1e-4)  # type: ignore[index]
        assert max(choice.logprobs.top_logprobs[place].values()) == pytest.approx(
            float(expected[place - 1].max()), abs=1e-4
        )  # type: ignore[index]
    assert len(choice.logprobs.tokens) == len(ids) + 2  # type: ignore[arg-type]
    assert choice.logprobs.tokens[-1] in choice.logprobs.top_logprobs[-1]  # type: ignore[index, operator]
    by_id = client.completions.create(
        prompt=ids,
        max_tokens=0,
        extra_body={"prompt_logprobs": 2, "return_tokens_as_token_ids": True},
        **settings,
    ).choices[0]
    entries = by_id.model_extra["prompt_logprobs"]  # type: ignore[index]
    assert entries[0] is None
    assert entries[1][str(ids[1])]["logprob"] == pytest.approx(float(expected[0, ids[1]]), abs=1e-4)
    assert [entry["rank"] for entry in list(entries[1].values())[-2:]] == [1, 2]
    chat = client.chat.completions.create(messages=QUESTION, max_tokens=3, logprobs=True, top_logprobs=2, **settings)  # type: ignore[arg-type]
    content = chat.choices[0].logprobs.content  # type: ignore[union-attr]
    assert len(content) == 3  # type: ignore[arg-type]
    assert content[0].top_logprobs[0].logprob == content[0].logprob  # type: ignore[index]


def test_models_are_listed(client: openai.OpenAI, name: str, server: Server) -> None:
    assert [one.id for one in client.models.list()] == [name]
    assert client.models.retrieve(name).id == name
    assert raw(server, "GET", "/health") == (200, {"status": "ok"})


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"model": "other"}, openai.NotFoundError, "The model 'other' does not exist; this server has"),
        ({"messages": []}, openai.BadRequestError, "messages: List should have at least 1 item"),
        ({"messages": [{"role": "bot", "content": "a"}]}, openai.BadRequestError, 'message 1 has role "bot"'),
        ({"messages": [ANSWER]}, openai.BadRequestError, "messages: there is nothing to answer"),
        ({"temperature": -1}, openai.BadRequestError, "temperature: Input should be greater than or equal to 0"),
        ({"max_tokens": 401}, openai.BadRequestError, "max_tokens: at most 400 on this server"),
        ({"max_tokens": 400, "messages": LONG}, openai.BadRequestError, "maximum context length is 512 tokens"),
        ({"tools": [{"type": "function"}]}, openai.BadRequestError, "tools: Field required"),
        ({"functions": [{"name": "f"}]}, openai.BadRequestError, "functions is not supported"),
        ({"n": 99}, openai.BadRequestError, "n: Input should be less than or equal to 16"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens: Input should be greater than or equal to 1"),
    ],
)  # fmt: skip
def test_errors_have_openais_types(
    client: openai.OpenAI, name: str, changes: dict[str, Any], kind: type[openai.APIStatusError], message: str
) -> None:
    with pytest.raises(kind) as caught:
        client.chat.completions.create(**{"model": name, "messages": QUESTION} | changes)
    assert message in caught.value.message
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": []}, "prompt is empty; expected text or token ids"),
        ({"prompt": [[9999]]}, "prompt: token ids must be from 0 to"),
        ({"prompt": ["a"] * 65}, "The request is for 65 texts; at most 64 on this server"),
        ({"max_tokens": 0}, "max_tokens: 0 needs echo or prompt_logprobs"),
        ({"echo": True, "stream": True}, "cannot be streamed"),
    ],
)
def test_completions_are_checked(client: openai.OpenAI, name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
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
def test_malformed_requests_are_rejected(
    server: Server, method: str, path: str, body: bytes, headers: dict[str, str], status: int
) -> None:
    answered, response = raw(server, method, path, body, **headers)
    assert answered == status
    assert response["error"]["type"] == "invalid_request_error"


def test_requests_with_another_host_name_are_rejected(server: Server) -> None:
    """A page in a browser could otherwise reach the model through a domain name that resolves to this machine."""
    assert raw(server, "GET", "/v1/models", Host="evil.example")[0] == 400


def test_a_full_queue_is_an_error_and_a_closed_connection_frees_its_place(small_model: Path) -> None:
    with (
        serving(small_model, batch_size=1, queue=1) as server,
        openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=300) as client,
    ):
        long: dict[str, Any] = {"model": server.name, "prompt": PROMPT, "max_tokens": 400, "stream": True}
        first = client.completions.create(**long, logit_bias={})
        next(iter(first))
        second = client.completions.create(**long)
        with pytest.raises(openai.RateLimitError, match="The queue is full"):
            client.completions.create(model=server.name, prompt=PROMPT, max_tokens=1)
        second.close()
        first.close()
        wait_until_free(server)
        assert client.completions.create(model=server.name, prompt=PROMPT, max_tokens=1).choices[0].finish_reason
        assert server.worker.largest_batch == 1


def test_a_failing_model_is_an_error_and_the_server_continues(
    client: openai.OpenAI, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr("hymba_tune.generate.ChunkedDecoder.step", fail)
        with pytest.raises(openai.InternalServerError, match="The model failed: RuntimeError: out of memory"):
            client.completions.create(model=name, prompt=PROMPT, max_tokens=2)
    assert client.completions.create(model=name, prompt=PROMPT, max_tokens=2).choices


def test_a_port_in_use_is_reported_before_the_weights_load(small_model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--port {port}: cannot listen on this address: Address already in use"):
            Server(ServeConfig(model=str(small_model), port=port), working)


@pytest.mark.parametrize("host", ["no.such.host.invalid", "x" * 300])
def test_address_of_no_machine_is_refused(small_model: Path, host: str) -> None:
    with pytest.raises(ConfigError, match=r"--host .*: no such address\.\n.*\n  to fix     --host 127\.0\.0\.1"):
        Server(ServeConfig(model=str(small_model), host=host), working)

"""Reading requests: whatever a client sends is a request or an error in OpenAI's format."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hymba_tune.checkpoint import load_tokenizer
from hymba_tune.data import Conversation, Message, encode_prompt
from hymba_tune.serve import reading
from hymba_tune.serve.items import ResponsesRequest
from hymba_tune.serve.reading import Limits, RequestReader
from hymba_tune.serve.requests import ApiError, ChatRequest, CompletionRequest, read_request

LIMITS = Limits(context=300, new_tokens=100, texts=64, body=2**16)
CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
COMPLETION: dict[str, Any] = {"model": "m", "prompt": "Hi"}
KINDS = (ChatRequest, CompletionRequest, ResponsesRequest)
FIELDS = sorted({*(name for kind in KINDS for name in kind.model_fields), "user", "function_call"})
texts = st.text(st.characters(), max_size=9) | st.sampled_from(["user", "assistant", "", "\ud800", "m"])
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts | st.sampled_from(FIELDS), inner, max_size=3),
    max_leaves=5,
)
messages = st.lists(st.fixed_dictionaries({"role": texts}, optional={"content": values, "tool_calls": values}))


@pytest.fixture(scope="module")
def tokenizer(small_model: Path) -> Any:
    return load_tokenizer(small_model)


@pytest.fixture(scope="module")
def reader(tokenizer: Any) -> RequestReader:
    return RequestReader("m", tokenizer, LIMITS)


def body(fields: object) -> bytes:
    return json.dumps(fields).encode()


@pytest.mark.parametrize(("kind", "required"), [(ChatRequest, CHAT), (CompletionRequest, COMPLETION)])
def test_null_means_the_default_for_every_parameter(kind: Any, required: dict[str, Any]) -> None:
    optional = [name for name, field in kind.model_fields.items() if not field.is_required()]
    assert {"temperature", "top_p", "n", "seed", "stop", "stream", "max_tokens"} <= {*optional}
    expected = read_request(kind, body(required))
    assert read_request(kind, body(required | dict.fromkeys(optional))) == expected
    streamed = required | {"stream": True, "stream_options": {"include_usage": None}}
    assert read_request(kind, body(streamed)).stream_options.include_usage is False


@given(
    fields=st.dictionaries(st.sampled_from(FIELDS) | texts, values, max_size=4),
    turns=st.none() | messages,
    kind=st.sampled_from(["chat", "completion", "response"]),
)
@settings(max_examples=300, deadline=None)
def test_any_json_is_a_request_or_an_error(
    reader: RequestReader, fields: dict[str, Any], turns: list[Any] | None, kind: str
) -> None:
    required = {"chat": CHAT, "completion": COMPLETION, "response": {"model": "m", "input": "Hi"}}[kind]
    given_turns = {} if turns is None else {"input" if kind == "response" else "messages": turns}
    error = None
    try:
        getattr(reader, kind)(body(required | fields | given_turns))
    except ApiError as caught:
        error = caught
    if error:
        assert error.status in (400, 404)
        assert json.dumps(error.body, ensure_ascii=False).encode()
        assert len(error.body["error"]["message"]) < 600


@pytest.mark.parametrize(
    "text",
    [
        b'{"model": "m", "prompt": "\\ud800"}',
        b'{"model": "\\udfff", "prompt": "a"}',
        b'{"model": "m", "prompt": "a", "\\ud800": 1}',
        b'{"model": "m", "prompt": "a", "stop": ["\\ud83d"]}',
        b'{"model": "m", "prompt": "a", "temperature": NaN}',
        b'{"model": "m", "prompt": "\xff"}',
        b"[" * 50_000,
        b"",
    ],
)
def test_what_is_no_json_is_an_error(reader: RequestReader, text: bytes) -> None:
    with pytest.raises(ApiError, match="The body is not JSON") as caught:
        reader.completion(text)
    assert json.dumps(caught.value.body, ensure_ascii=False).encode()


@pytest.mark.parametrize("content", ["", " \n", None, []])
def test_an_earlier_answer_may_be_empty(reader: RequestReader, tokenizer: Any, content: object) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": content}, CHAT["messages"][0]]
    _, (generation,) = reader.chat(body(CHAT | {"messages": turns}))
    conversation = Conversation((Message("user", "Hi"), Message("assistant", ""), Message("user", "Hi")))
    assert generation.prompt == encode_prompt(conversation, tokenizer)


def test_a_conversation_that_begins_with_the_assistant_is_answered(reader: RequestReader, tokenizer: Any) -> None:
    greeted = [{"role": "assistant", "content": "Welcome"}, *CHAT["messages"]]
    _, (generation,) = reader.chat(body(CHAT | {"messages": greeted}))
    conversation = Conversation((Message("assistant", "Welcome"), Message("user", "Hi")))
    assert generation.prompt == encode_prompt(conversation, tokenizer)


def test_a_late_system_message_is_refused(reader: RequestReader) -> None:
    turns = [*CHAT["messages"], {"role": "assistant", "content": "Hello"}, {"role": "system", "content": "Be brief."}]
    with pytest.raises(ApiError, match="messages: message 3 is a system message after others"):
        reader.chat(body(CHAT | {"messages": [*turns, *CHAT["messages"]]}))


def test_more_messages_than_the_context_has_tokens_are_refused_before_they_are_rendered(
    reader: RequestReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "render_prompt", None)
    with pytest.raises(ApiError, match="301 messages exceed the model's context of 300 tokens") as caught:
        reader.chat(body(CHAT | {"messages": CHAT["messages"] * 301}))
    assert caught.value.body["error"]["code"] == "context_length_exceeded"


def test_more_texts_than_the_queue_holds_are_refused_before_they_are_tokenized(reader: RequestReader) -> None:
    with pytest.raises(ApiError, match="The request is for 160 texts; at most 64"):
        reader.completion(body({"model": "m", "prompt": [""] * 10, "n": 16}))


def test_whole_texts_do_not_fill_the_tokenizers_cache() -> None:
    """It grew by 3 MB for every thousand short texts, up to 10,000 of them."""
    sizes: list[int] = []
    model = SimpleNamespace(_resize_cache=sizes.append)
    for pre_tokenizer in (None, object()):
        backend = SimpleNamespace(pre_tokenizer=pre_tokenizer, model=model)
        RequestReader("m", SimpleNamespace(backend_tokenizer=backend), LIMITS)  # type: ignore[arg-type]
    assert sizes == [reading.CACHED_TEXTS]

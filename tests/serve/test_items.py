"""OpenAI's responses, with OpenAI's own client: the answers are those of chats."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

from hymba_tune.serve import Server
from hymba_tune.serve.items import ResponsesRequest
from hymba_tune.serve.requests import ApiError
from tests.serve.servers import QUESTION, raw

WEATHER: Any = {
    "type": "function",
    "name": "weather",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Rome", "Oslo"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


class City(BaseModel):
    name: Literal["Rome", "Oslo"]


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=300) as client:
        yield client


def test_a_response_is_the_chats_answer(client: openai.OpenAI, server: Server) -> None:
    text = QUESTION[0]["content"]
    settings: dict[str, Any] = {"model": server.name, "temperature": 0, "max_output_tokens": 12}
    system = {"role": "system", "content": "Be brief."}
    chat = client.chat.completions.create(
        model=server.name,
        messages=[system, *QUESTION],
        temperature=0,
        max_tokens=12,  # type: ignore[list-item]
    )
    whole = client.responses.create(**settings, instructions="Be brief.", input=text)
    assert whole.output_text == chat.choices[0].message.content
    assert (whole.status, whole.incomplete_details.reason) == ("incomplete", "max_output_tokens")  # type: ignore[union-attr]
    assert whole.usage is not None
    assert chat.usage is not None
    assert whole.usage.input_tokens == chat.usage.prompt_tokens
    assert whole.usage.output_tokens == 12

    parts = [{"role": "user", "content": [{"type": "input_text", "text": text}]}]
    with client.responses.stream(**settings, instructions="Be brief.", input=parts) as stream:
        events = list(stream)
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    assert [event.sequence_number for event in events] == [*range(len(events))]
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.output_text == whole.output_text

    following = [*QUESTION, *whole.output, {"role": "user", "content": "And now?"}]
    assert client.responses.create(**settings, input=following).output_text is not None  # type: ignore[arg-type]


def test_a_response_calls_tools(client: openai.OpenAI, server: Server) -> None:
    settings: dict[str, Any] = {"model": server.name, "temperature": 0, "max_output_tokens": 90, "tools": [WEATHER]}
    choice = {"type": "function", "name": "weather"}
    settings |= {"tool_choice": choice, "parallel_tool_calls": False}
    (call,) = client.responses.create(**settings, input="Rain?").output
    assert call.type == "function_call"
    assert call.name == "weather"
    assert json.loads(call.arguments)["city"] in ("Rome", "Oslo")
    with client.responses.stream(**settings, input="Rain?") as stream:
        (same,) = stream.get_final_response().output
    assert same.arguments == call.arguments  # type: ignore[union-attr]

    output = {"type": "function_call_output", "call_id": call.call_id, "output": "Sun"}
    items: Any = [{"role": "user", "content": "Rain?"}, call, output]
    answer = client.responses.create(**settings | {"tool_choice": "none"}, input=items)
    assert all(item.type == "message" for item in answer.output)


def test_a_response_has_the_form_that_is_asked_for(client: openai.OpenAI, server: Server) -> None:
    response = client.responses.parse(model=server.name, input="Which city?", text_format=City, max_output_tokens=90)
    assert isinstance(response.output_parsed, City)
    assert response.status == "completed"


def test_calls_of_one_answer_are_one_message() -> None:
    call = {"type": "function_call", "call_id": "1", "name": "weather", "arguments": "{}"}
    output = {"type": "function_call_output", "call_id": "1", "output": [{"type": "input_text", "text": "Sun"}]}
    items = [{"role": "user", "content": "Hi"}, call, call, output]
    messages = ResponsesRequest(model="m", input=items).as_chat().messages
    assert [message["role"] for message in messages] == ["user", "assistant", "tool"]
    assert len(messages[1]["tool_calls"]) == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id is not supported"),
        ({"truncation": "auto"}, "truncation is not supported"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input: items of type 'reasoning' are not supported"),
        ({"tools": [{"type": "web_search"}]}, "tool: only functions are supported"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice: only functions are supported"),
        ({"temperature": -1}, "temperature: Input should be greater than or equal to 0"),
        ({"text": {"format": {"type": "xml"}}}, "response_format: Input should be"),
        ({"input": []}, "messages: List should have at least 1 item"),
    ],
)
def test_what_a_chat_cannot_do_is_refused(
    client: openai.OpenAI, server: Server, fields: dict[str, Any], message: str
) -> None:
    body = {"model": server.name, "input": "Hi", "max_output_tokens": 2, "truncation": "disabled", "store": True}
    with pytest.raises(openai.BadRequestError, match=message):
        client.responses.create(**body | fields)  # type: ignore[call-overload]
    assert client.responses.create(**body).status == "incomplete"  # type: ignore[call-overload]


def test_an_error_within_a_stream_is_an_event(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("hymba_tune.generate.ChunkedDecoder.step", fail)
    body = json.dumps({"model": server.name, "input": "Hi", "stream": True}).encode()
    status, events = raw(server, "POST", "/v1/responses", body)
    assert status == 200
    assert events.count("event: response.") == 2
    assert 'event: error\ndata: {"type": "error", "sequence_number": 2' in events
    with pytest.raises(ApiError, match="tool: only functions"):
        ResponsesRequest(model="m", input="Hi", tools=[{"type": "mcp"}]).as_chat()

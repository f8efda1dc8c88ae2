"""The clients of litellm and langchain: chats, streams, tools and JSON. OpenAI's own client is in the other files."""

from __future__ import annotations

import json
from typing import Any, Literal

import pytest
from pydantic import BaseModel

from hymba_tune.serve import Server
from tests.serve.servers import QUESTION

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("default")]
CITY: dict[str, Any] = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]}
CITY["additionalProperties"] = False
WEATHER: dict[str, Any] = {"name": "weather", "description": "Forecast", "parameters": CITY}
TOOLS = [{"type": "function", "function": WEATHER}]


class City(BaseModel):
    """A city."""

    name: Literal["Rome", "Oslo"]
    rainy: bool


@pytest.fixture(scope="module")
def litellm() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # it downloads a list of prices otherwise
        import litellm
    return litellm


@pytest.fixture
def asked(server: Server) -> dict[str, Any]:
    """What every request through litellm has."""
    model = f"openai/{server.name}"
    return {"model": model, "api_base": server.url, "api_key": "none", "messages": QUESTION, "max_tokens": 200}


@pytest.fixture
def chat(server: Server) -> Any:
    from langchain_openai import ChatOpenAI

    return ChatOpenAI(
        model=server.name,
        base_url=server.url,
        api_key="none",
        temperature=0,
        max_tokens=200,
        max_retries=0,
        stream_usage=True,
    )


def test_litellm_chats(litellm: Any, asked: dict[str, Any]) -> None:
    whole = litellm.completion(**asked | {"max_tokens": 8}, temperature=0)
    assert whole.usage.completion_tokens == 8
    chunks = litellm.completion(**asked | {"max_tokens": 8}, temperature=0, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    varied = {"top_k": 3, "min_p": 0.1, "repetition_penalty": 1.2, "stop_token_ids": [7]}
    assert litellm.completion(**asked, frequency_penalty=1, extra_body=varied).choices
    completion = litellm.text_completion(
        model=asked["model"].replace("openai/", "text-completion-openai/"),
        prompt="I see two",
        api_base=asked["api_base"],
        api_key="none",
        max_tokens=4,
    )
    assert completion.choices[0].finish_reason == "length"


def test_litellm_calls_tools(litellm: Any, asked: dict[str, Any]) -> None:
    settings = asked | {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "seed": 1}
    choice = litellm.completion(**settings).choices[0]
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls"
    assert json.loads(call.function.arguments)["city"] in ("Rome", "Oslo")
    streamed = litellm.stream_chunk_builder([*litellm.completion(**settings, stream=True)])
    assert streamed.choices[0].message.tool_calls[0].function.arguments == call.function.arguments
    answered = [*QUESTION, choice.message, {"role": "tool", "tool_call_id": call.id, "content": "Sun"}]
    assert litellm.completion(**asked | {"messages": answered, "tools": TOOLS, "tool_choice": "none"}).choices


def test_litellm_reads_json(litellm: Any, asked: dict[str, Any]) -> None:
    text = litellm.completion(**asked, response_format=City, seed=2).choices[0].message.content
    assert City.model_validate_json(text)


def test_litellm_knows_errors(litellm: Any, asked: dict[str, Any]) -> None:
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(**asked | {"messages": [{"role": "user", "content": "a b " * 400}]})
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(**asked | {"model": "openai/other"})


def test_langchain_chats(chat: Any) -> None:
    whole = chat.invoke("I see two cats. What do I see?")
    chunks = list(chat.stream("I see two cats. What do I see?"))
    assert "".join(chunk.content for chunk in chunks) == whole.content
    assert whole.usage_metadata["output_tokens"] == sum(
        (chunk.usage_metadata or {}).get("output_tokens", 0) for chunk in chunks
    )
    assert len(chat.batch(["Hi", "Hello"])) == 2


def test_langchain_calls_tools(chat: Any) -> None:
    from langchain_core.messages import HumanMessage, ToolMessage

    bound = chat.bind_tools(TOOLS, tool_choice="weather", parallel_tool_calls=False)
    question = HumanMessage("Rain in Rome?")
    answer = bound.invoke([question])
    (call,) = answer.tool_calls
    assert call["name"] == "weather"
    assert call["args"]["city"] in ("Rome", "Oslo")
    streamed = None
    for chunk in bound.stream([question]):
        streamed = chunk if streamed is None else streamed + chunk
    assert streamed is not None
    assert streamed.tool_calls[0]["args"] == call["args"]
    assert chat.invoke([question, answer, ToolMessage("Sun", tool_call_id=call["id"])]).content is not None


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_langchain_reads_structured_output(chat: Any, method: str) -> None:
    assert isinstance(chat.with_structured_output(City, method=method, strict=True).invoke("Which city?"), City)

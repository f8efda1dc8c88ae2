"""Tool calls and JSON: what a client asks for is what it gets, from a random model as well."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

from hymba_tune.checkpoint import load_tokenizer
from hymba_tune.data import Conversation, Message, encode_prompt
from hymba_tune.generate import Generation, Grammars
from hymba_tune.serve import Server
from hymba_tune.serve.reading import Limits, RequestReader
from hymba_tune.serve.requests import ApiError, ChatRequest
from hymba_tune.serve.responses import AnswerStream, delta
from hymba_tune.serve.tools import answer_grammar, split_calls
from tests.serve.servers import QUESTION

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "maximum": 9, "minimum": 0}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
NOW = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "additionalProperties": False}}}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Forecast", "parameters": PARAMETERS}}
TOOLS: list[Any] = [WEATHER, NOW]
NAMED = {"type": "function", "function": {"name": "weather"}}
CALL = '<toolcall> {"name": "weather", "arguments": {"city": "Rome", "days": 1}} </toolcall>'
READ = {"name": "weather", "arguments": '{"city": "Rome", "days": 1}'}


class City(BaseModel):
    name: Literal["Rome", "Oslo"]
    rainy: bool


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=300) as client:
        yield client


@pytest.fixture(scope="module")
def tokenizer(small_model: Any) -> Any:
    return load_tokenizer(small_model)


@pytest.fixture(scope="module")
def reader(tokenizer: Any) -> RequestReader:
    return RequestReader("m", tokenizer, Limits(context=2000, new_tokens=100, texts=64, body=2**16))


def chat(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "messages": QUESTION, **fields}).encode()


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("Hello", "Hello", []),
        (CALL, "", [READ]),
        (f"Let me see.\n{CALL}\n{CALL}", "Let me see.\n\n", [READ, READ]),
        (CALL.removesuffix(" </toolcall>"), "", [READ]),
        ('<toolcall>{"name": "now"}</toolcall>', "", [{"name": "now", "arguments": "{}"}]),
        ("<toolcall> now() </toolcall>", "<toolcall> now() </toolcall>", []),
        ('<toolcall> {"name": "now", "arguments": "x"} </toolcall>', None, []),
        ('<toolcall> {"arguments": {}} </toolcall>', None, []),
        ("2 <toolcall> 3", "2 <toolcall> 3", []),
    ],
)
def test_calls_are_separated_from_the_text(text: str, content: str | None, calls: list[Any]) -> None:
    assert split_calls(text, finished=True) == (text if content is None else content, calls)


@pytest.mark.parametrize(
    "text", [f"Let me see.\n{CALL}\n{CALL}", "a <b> <toolcal c", CALL[:-3], f"{CALL} <toolcall> x"]
)
def test_a_streamed_answer_is_the_whole_one(text: str) -> None:
    """Whatever the lengths of its parts are."""

    class Characters:
        def decode(self, ids: list[int], **_: Any) -> str:
            return "".join(map(chr, ids))

    whole = Generation([1], 999, ids=[*map(ord, text)], finish_reason="stop")
    expected = AnswerStream(whole, Characters(), stripped=True, reads_calls=True)  # type: ignore[arg-type]
    content = expected.next()
    for step in (1, 3, 7):
        generation = Generation([1], 999)
        stream = AnswerStream(generation, Characters(), stripped=True, reads_calls=True)  # type: ignore[arg-type]
        deltas: list[Any] = []
        for end in range(0, len(text) + step, step):
            generation.ids = [*map(ord, text[:end])]
            generation.finish_reason = "stop" if end >= len(text) else None
            earlier = len(stream.calls)
            deltas.append(delta(stream.next(), stream.calls, earlier))
        assert "".join(one.get("content", "") for one in deltas) == content
        called = [call for one in deltas for call in one.get("tool_calls", [])]
        assert [call["function"] for call in called] == [call["function"] for call in expected.calls]
        assert [call["index"] for call in called] == [*range(len(called))]
        assert stream.finish_reason == expected.finish_reason


def test_tools_are_shown_as_in_training(reader: RequestReader, tokenizer: Any) -> None:
    conversation = Conversation((Message("user", QUESTION[0]["content"]),), (WEATHER, NOW))
    _, (generation,) = reader.chat(chat(tools=TOOLS))
    assert generation.prompt == encode_prompt(conversation, tokenizer)
    assert generation.constraint is None
    _, (without,) = reader.chat(chat(tools=TOOLS, tool_choice="none"))
    _, (plain,) = reader.chat(chat(tool_choice="none"))
    assert without.prompt == plain.prompt == encode_prompt(Conversation(conversation.messages), tokenizer)


def test_a_forced_call_is_a_call(client: openai.OpenAI, server: Server) -> None:
    settings: dict[str, Any] = {"model": server.name, "messages": QUESTION, "tools": TOOLS, "seed": 1, "max_tokens": 90}
    settings |= {"tool_choice": NAMED, "parallel_tool_calls": False}
    choice = client.chat.completions.create(**settings).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    (call,) = choice.message.tool_calls or ()
    assert call.type == "function"
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments).keys() == {"city", "days"}

    with client.chat.completions.stream(**settings) as stream:
        streamed = stream.get_final_completion().choices[0]
    assert streamed.finish_reason == "tool_calls"
    (same,) = streamed.message.tool_calls or ()
    assert same.function.arguments == call.function.arguments

    answered = [*QUESTION, choice.message, {"role": "tool", "tool_call_id": call.id, "content": "Sun"}]
    following = client.chat.completions.create(**settings | {"messages": answered, "tool_choice": "none"})
    assert following.choices[0].message.tool_calls is None


@pytest.mark.parametrize(
    ("fields", "texts", "others"),
    [
        ({"tool_choice": "required"}, [CALL, f"{CALL}\n{CALL}"], ["Hello", CALL.replace("Rome", "Bonn"), f"{CALL} a"]),
        ({"tool_choice": NAMED}, [CALL], ['<toolcall> {"name": "now", "arguments": {}} </toolcall>']),
        ({"tool_choice": "required", "parallel_tool_calls": False}, [CALL], [f"{CALL}\n{CALL}"]),
        ({"response_format": {"type": "json_object"}}, [CALL, '{"a": [1]}'], ["Hello", "[1]"]),
        (
            {"tools": [{"type": "function", "function": WEATHER["function"] | {"strict": True}}]},  # type: ignore[operator]
            ["Hello", f"So: {CALL} and {CALL}", "a <b>"],
            [CALL.replace("Rome", "Bonn"), "<toolcall> now"],
        ),
    ],
)
def test_grammars_of_tools(tokenizer: Any, fields: dict[str, Any], texts: list[str], others: list[str]) -> None:
    request = ChatRequest.model_validate({"model": "m", "messages": QUESTION, "tools": TOOLS} | fields)
    grammars = Grammars(tokenizer)
    grammar = answer_grammar(request)
    assert grammar
    for text in texts:
        assert grammars.lark(grammar).skip(grammars.tokens(text)), text
    for text in others:
        assert not grammars.lark(grammar).skip(grammars.tokens(text)), text


def test_json_of_a_schema(client: openai.OpenAI, server: Server) -> None:
    settings: dict[str, Any] = {"model": server.name, "messages": QUESTION, "max_tokens": 200, "seed": 3}
    parsed = client.chat.completions.parse(**settings, response_format=City).choices[0].message.parsed
    assert isinstance(parsed, City)
    schema: Any = {"type": "json_schema", "json_schema": {"name": "city", "schema": {"enum": [["a", 1]]}}}
    text = client.chat.completions.create(**settings, response_format=schema).choices[0].message.content
    assert json.loads(str(text)) == ["a", 1]
    completion = client.completions.create(
        model=server.name, prompt="City:", max_tokens=200, seed=3, extra_body={"response_format": schema}
    )
    assert json.loads(completion.choices[0].text) == ["a", 1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tool_choice": "required"}, "tool_choice: tools is empty"),
        ({"tools": [NOW], "tool_choice": NAMED}, "tool_choice: tools has no function 'weather'"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools: String should match pattern"),
        ({"response_format": {"type": "json_schema"}}, "response_format: json_schema is missing"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "objekt"}}}},
            "The schema cannot be enforced: .*Invalid type: objekt",
        ),
        ({"logit_bias": {"99999": 1}}, "logit_bias: token ids must be from 0 to"),
        ({"stop_token_ids": [-1]}, "stop_token_ids: token ids must be from 0 to"),
        ({"continue_final_message": True}, "continue_final_message: the last message is not the assistant's"),
    ],
)
def test_what_cannot_be_done_is_refused(reader: RequestReader, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ApiError, match=message):
        reader.chat(chat(**fields))


def test_a_template_without_tools_is_refused(tokenizer: Any) -> None:
    silent = copy.deepcopy(tokenizer)
    silent.chat_template = silent.chat_template.replace("tools or []", "[]")
    reader = RequestReader("m", silent, Limits(context=2000, new_tokens=100, texts=64, body=2**16))
    with pytest.raises(ApiError, match="tools: the model's chat template shows no tools"):
        reader.chat(chat(tools=TOOLS))


def test_the_last_answer_is_continued(client: openai.OpenAI, server: Server, reader: RequestReader) -> None:
    begun = [*QUESTION, {"role": "assistant", "content": "You see"}]
    _, (plain,) = reader.chat(chat())
    _, (generation,) = reader.chat(chat(messages=begun))
    assert generation.prompt[: len(plain.prompt)] == plain.prompt
    settings: dict[str, Any] = {"model": server.name, "max_tokens": 8, "temperature": 0}
    text = client.chat.completions.create(messages=begun, **settings).choices[0].message.content  # type: ignore[arg-type]
    ids = list(generation.prompt)
    completion = client.completions.create(prompt=ids, **settings).choices[0].text
    assert text == completion.rstrip()
    streamed = client.chat.completions.create(messages=begun, **settings, stream=True)  # type: ignore[arg-type]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == text


def test_the_beginning_of_the_answer_must_have_its_form(client: openai.OpenAI, server: Server) -> None:
    settings: dict[str, Any] = {"model": server.name, "max_tokens": 60, "response_format": {"type": "json_object"}}
    begun = [*QUESTION, {"role": "assistant", "content": '{"a":'}]
    text = client.chat.completions.create(messages=begun, seed=1, **settings).choices[0].message.content  # type: ignore[arg-type]
    assert not str(text).lstrip().startswith('{"a"')
    begun[-1] = {"role": "assistant", "content": "Well"}
    with pytest.raises(openai.BadRequestError, match="the beginning of the answer does not have its form"):
        client.chat.completions.create(messages=begun, **settings)  # type: ignore[arg-type]


def test_penalties_and_biases_reach_the_model(client: openai.OpenAI, server: Server) -> None:
    settings: dict[str, Any] = {"model": server.name, "prompt": "I see", "max_tokens": 4, "temperature": 0}
    biased = client.completions.create(**settings, logit_bias={"350": 100}, logprobs=0).choices[0]
    assert biased.text == "{{{{"
    stopped = client.completions.create(**settings, logit_bias={"350": 100}, extra_body={"stop_token_ids": [350]})
    assert (stopped.choices[0].text, stopped.choices[0].finish_reason) == ("", "stop")
    free = {"top_k": 1, "min_p": 0.5, "repetition_penalty": 1.5}
    varied = client.completions.create(
        **settings | {"temperature": 1}, presence_penalty=2, frequency_penalty=2, extra_body=free
    )
    assert len(varied.choices[0].text) > 0

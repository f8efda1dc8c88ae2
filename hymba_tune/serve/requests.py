"""The fields of requests, and the errors for fields that are not supported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json

from hymba_tune.data.values import without_nulls

MOST_CHOICES = 16
MOST_LOGPROBS = 128
MOST_TOOLS = 128
MOST_BIASES = 1024
IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
"""Fields of OpenAI's API that do not change an answer; accepted and ignored."""
MOST_SHOWN = 500
"""Maximum number of characters of an error message, which may quote a part of a request."""
EMPTY: tuple[object, ...] = (None, False, 0, "", [], {})


class ApiError(Exception):
    """An error response in OpenAI's format.

    Args:
        status: The HTTP status.
        message: A sentence that says what is wrong.
        kind: OpenAI's error type.
        param: The request field that is wrong.
        code: OpenAI's error code.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        message = message if len(message) <= MOST_SHOWN else f"{message[:MOST_SHOWN]}…"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


Stop = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=256)]], BeforeValidator(_as_list), Field(max_length=16)
]


class Fields(BaseModel):
    """Fields of a request. Null means the default, in every field that has one."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, body: object) -> object:
        return {name: value for name, value in body.items() if value is not None} if isinstance(body, dict) else body


def reject_unknown(extra: Mapping[str, Any]) -> None:
    """Refuse fields that are not known, unless they are empty or change no answer.

    Raises:
        ApiError: If there is one.
    """
    if unknown := [name for name, value in extra.items() if name not in IGNORED and value not in EMPTY]:
        raise ApiError(400, f"{unknown[0]} is not supported.", param=unknown[0], code="unsupported_parameter")


class StreamOptions(Fields):
    """Options of streamed responses."""

    include_usage: bool = False


class JsonSchema(Fields):
    """A JSON schema that an answer must follow."""

    json_schema: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: bool = False


class ResponseFormat(Fields):
    """The form of an answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise ApiError(400, "response_format: json_schema is missing.", param="response_format")
        return self

    @property
    def schema_of_answer(self) -> dict[str, Any] | None:
        """The JSON schema of the answer, or None for any text."""
        if self.type == "text":
            return None
        if self.json_schema is None or self.type == "json_object":
            return {"type": "object"}
        return self.json_schema.json_schema

    @property
    def strict(self) -> bool:
        """Whether a schema with keywords that cannot be enforced is an error."""
        return self.json_schema is not None and self.json_schema.strict


class Function(Fields):
    """A function that the model may call."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    parameters: dict[str, Any] = Field(default_factory=dict)
    strict: bool = False


class Tool(Fields):
    """A tool that the model may use; ``shown`` is its description as the client wrote it."""

    type: Literal["function"]
    function: Function
    shown: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _keep(cls, body: object) -> object:
        return {**body, "shown": without_nulls(body)} if isinstance(body, dict) else body


class ToolName(Fields):
    """The name of a function."""

    name: str


class ToolChoice(Fields):
    """The tool that the model must use."""

    type: Literal["function"]
    function: ToolName


class BaseRequest(Fields):
    """The fields that chat and text completions share."""

    model_config = ConfigDict(extra="allow")

    model: str
    max_tokens: int | None = Field(default=None, ge=0)
    temperature: float = Field(default=1.0, ge=0, le=100, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=-1, lt=2**31)
    min_p: float = Field(default=0.0, ge=0, le=1)
    repetition_penalty: float = Field(default=1.0, gt=0, le=100)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] = Field(
        default_factory=dict, max_length=MOST_BIASES
    )
    stop_token_ids: list[int] = Field(default_factory=list, max_length=16)
    response_format: ResponseFormat | None = None
    n: int = Field(default=1, ge=1, le=MOST_CHOICES)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: Stop | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _reject_unknown_fields(self) -> BaseRequest:
        reject_unknown(self.model_extra or {})
        return self


class CompletionRequest(BaseRequest):
    """A prompt, or several, to continue."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int = Field(default=16, ge=0)
    echo: bool = False
    logprobs: int | None = Field(default=None, ge=0, le=MOST_LOGPROBS)
    prompt_logprobs: int | None = Field(default=None, ge=0, le=MOST_LOGPROBS)
    return_tokens_as_token_ids: bool = False

    @property
    def scores_prompt(self) -> bool:
        """Whether the response has the log-probabilities of the prompt."""
        return self.prompt_logprobs is not None or (self.echo and self.logprobs is not None)

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each a text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return [one for one in self.prompt if not isinstance(one, int)]


class ChatRequest(BaseRequest):
    """A conversation to answer."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MOST_LOGPROBS)
    tools: list[Tool] = Field(default_factory=list, max_length=MOST_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | ToolChoice = "auto"
    parallel_tool_calls: bool = True
    continue_final_message: bool | None = None

    @model_validator(mode="after")
    def _check_choice(self) -> ChatRequest:
        if self.tool_choice in ("none", "auto"):
            return self
        name = self.tool_choice.function.name if isinstance(self.tool_choice, ToolChoice) else None
        if not self.tools or (name is not None and name not in {tool.function.name for tool in self.tools}):
            what = f"tools has no function {name!r}" if self.tools and name else "tools is empty"
            raise ApiError(400, f"tool_choice: {what}.", param="tool_choice")
        return self

    @property
    def usable_tools(self) -> list[Tool]:
        """The tools that the model may use."""
        return [] if self.tool_choice == "none" else self.tools

    @property
    def limit(self) -> int | None:
        """The maximum number of new tokens, or None if the request does not set it."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


RequestType = TypeVar("RequestType", bound=Fields)


def read_request(kind: type[RequestType], body: bytes) -> RequestType:
    """Parse and validate a request's body.

    Raises:
        ApiError: If it is not JSON, or a field is missing, wrong or unknown.
    """
    try:
        fields = from_json(body, allow_inf_nan=False, cache_strings="keys")
    except ValueError as error:
        raise ApiError(400, f"The body is not JSON: {error}.") from None
    with validation_errors():
        return kind.model_validate(fields)


@contextmanager
def validation_errors() -> Iterator[None]:
    """Turn the first error of a validation into a response."""
    try:
        yield
    except ValidationError as error:
        problem = error.errors()[0]
        param = ".".join(map(str, problem["loc"][:1])) or None
        raise ApiError(400, f"{param or 'the body'}: {problem['msg']}.", param=param) from None

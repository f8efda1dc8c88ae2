"""What requests may ask, and what of it is refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

MOST_CHOICES = 16
MOST_LOGPROBS = 128
IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
"""What OpenAI's interface has besides, and what changes no answer."""
EMPTY: tuple[object, ...] = (None, False, 0, "", [], {})


class ApiError(Exception):
    """A request that is refused, in OpenAI's form.

    Args:
        status: Of the HTTP answer.
        message: What is wrong, in a sentence.
        kind: OpenAI's name for errors of its sort.
        param: The parameter that is wrong.
        code: OpenAI's code for it.
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
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


Stop = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=256)]], BeforeValidator(_listed), Field(max_length=16)
]


class StreamOptions(BaseModel):
    """What a stream brings besides."""

    include_usage: bool = False


class BaseRequest(BaseModel):
    """What chats and completions have in common."""

    model_config = ConfigDict(extra="allow")

    model: str
    max_tokens: int | None = Field(default=None, ge=0)
    temperature: float = Field(default=1.0, ge=0, le=100, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0, le=1)
    n: int = Field(default=1, ge=1, le=MOST_CHOICES)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: Stop | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _refuse_the_rest(self) -> BaseRequest:
        extra = self.model_extra or {}
        if unknown := [name for name, value in extra.items() if name not in IGNORED and value not in EMPTY]:
            raise ApiError(400, f"{unknown[0]} is not supported here.", param=unknown[0], code="unsupported_parameter")
        return self


class CompletionRequest(BaseRequest):
    """A text to go on with."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int = Field(default=16, ge=0)
    echo: bool = False
    logprobs: int | None = Field(default=None, ge=0, le=MOST_LOGPROBS)
    prompt_logprobs: int | None = Field(default=None, ge=0, le=MOST_LOGPROBS)
    return_tokens_as_token_ids: bool = False

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or several, each a text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return [one for one in self.prompt if not isinstance(one, int)]


class ChatRequest(BaseRequest):
    """A conversation to answer."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MOST_LOGPROBS)
    response_format: dict[Literal["type"], Literal["text"]] | None = None

    @property
    def limit(self) -> int | None:
        """Tokens that the answer may have, where that is said."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


A = TypeVar("A", bound=BaseRequest)


def read_request(kind: type[A], body: object) -> A:
    """A request's body as what it is to be.

    Raises:
        ApiError: If it is something else.
    """
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        problem = error.errors()[0]
        param = ".".join(map(str, problem["loc"][:1])) or None
        raise ApiError(400, f"{param or 'the body'}: {problem['msg']}.", param=param) from None

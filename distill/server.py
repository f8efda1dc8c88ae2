"""A teacher behind an OpenAI-compatible server, such as vLLM's: it tells its k likeliest tokens, and no more.

That is a bias. A piece gets only what the told tokens give it, and what was not told counts as "any piece outside the
support", though some of it would lie on pieces inside: these are drawn down and all others up, by at most the untold
mass. Within a token it weighs most, since there even tokens that do not begin as that one does are among the untold.
Spans are judged without it: the likelihood of a row's own tokens is always told.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hymba_tune.distill.outputs import HeadOutputs, TokenDistribution
from hymba_tune.distill.teacher import batches
from hymba_tune.errors import ConfigError, TrainingError

KEY_VARIABLE = "HYMBA_TUNE_TEACHER_KEY"
"""Environment variable with the server's key. It is sent to that server alone, and never shown."""
TIMEOUT = 120.0
"""Seconds that an answer may take."""
WRITING_TIMEOUT = 1200.0
"""Where it is text that the server writes."""
PAUSES = (1.0, 4.0, 16.0)
"""Seconds before a request is tried again."""
BATCH_TOKENS = 4096
"""Asked about in one request."""
ROUNDING = 0.01
"""How much more than 1 probabilities may come to."""
TOKEN_ID = "token_id:"
BIAS = "a server tells its {k} likeliest tokens: the untold mass counts as any other piece, also where it is not"


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Another address is not who the key is for."""

    def redirect_request(self, *_: Any) -> None:
        """Follow none."""


@dataclass
class ServedTeacher:
    """A model behind a server; see `Teacher` and `FoundTeacher`, for both of which it stands.

    Attributes:
        name: Of the model, and where it is.
        tokenizer: Its own, from elsewhere: a server has none to give.
        context: The most tokens of a row; None if the server does not say.
        top_k: Tokens that it is to tell.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase
    context: int | None
    top_k: int
    _base: str
    _model: str
    _device: torch.device = field(default=torch.device("cpu"))
    _echo: bool = False
    config: None = None
    parameters: None = None
    is_here: bool = True
    quantize: None = None

    @property
    def fingerprint(self) -> str:
        """Of what a server says of itself: the model's name there, and how much it tells."""
        return hashlib.sha256(json.dumps([self._model, self.top_k]).encode()).hexdigest()

    @property
    def bias(self) -> str:
        """What is to be known of its targets."""
        return BIAS.format(k=self.top_k)

    def load(self, device: torch.device, dtype: torch.dtype) -> ServedTeacher:
        """Itself: the server holds the weights."""
        del dtype
        self._device = device
        return self

    def outputs(self, rows: Sequence[Sequence[int]]) -> Iterator[tuple[int, ServedOutputs]]:
        """Read rows; see `Teacher`.

        Raises:
            TrainingError: If the server does not answer, or something else than it was asked.
        """
        for batch in batches([len(row) for row in rows], BATCH_TOKENS):
            told = self._ask([list(rows[index]) for index in batch])
            for index, answer in zip(batch, told, strict=True):
                yield index, self._outputs(rows[index], answer)

    def full_vocabulary(self, rows: Sequence[Sequence[int]]) -> list[HeadOutputs]:
        """Refuse, because a server returns its most likely tokens only.

        Raises:
            ConfigError: Always.
        """
        del rows
        raise self._unavailable("probabilities over the whole vocabulary")

    def hidden_states(self, rows: Sequence[Sequence[int]], at: Sequence[Tensor]) -> list[Tensor]:
        """Refuse, because a server does not return hidden states.

        Raises:
            ConfigError: Always.
        """
        del rows, at
        raise self._unavailable("hidden states")

    def _unavailable(self, quantity: str) -> ConfigError:
        return ConfigError(
            f"The teacher {self.name} is behind a server, which does not return {quantity}.",
            expected="a teacher whose weights are loaded on this machine",
            fix="--teacher with a Hub id or a folder",
        )

    def generate(
        self,
        prompts: Sequence[list[int]],
        *,
        ends: Sequence[int],
        max_new_tokens: int,
        temperature: float,
        seed: int,
        decode: Callable[[list[int]], str | None],
    ) -> list[str | None]:
        """Write an answer to each prompt; see `Teacher`. The texts have no white space around them.

        Raises:
            TrainingError: If the server does not answer, or its answer cannot be used.
        """
        del decode  # the server returns text
        names = list(map(str, self.tokenizer.convert_ids_to_tokens(list(ends))))
        options = {"max_tokens": max_new_tokens, "temperature": temperature, "seed": seed, "stop": names}
        # A server stops at the end tokens of its model's configuration, and does not look for special tokens in the
        # text. Other end tokens need their ids, a field that vLLM accepts and OpenAI's interface does not.
        if self.tokenizer.eos_token_id != ends[0]:
            options["stop_token_ids"] = list(ends)
        choices = self._complete(prompts, WRITING_TIMEOUT, **options)
        if not all(isinstance(choice.get("text"), str) for choice in choices):
            raise _wrong("it has no text")
        return [
            _without_end(choice["text"], names) or None if choice.get("finish_reason") == "stop" else None
            for choice in choices
        ]

    def _ask(self, prompts: list[list[int]]) -> list[list[Mapping[int, float]]]:
        """Of each prompt's tokens but the first, the log-probabilities that are told, the token's own among them."""
        if not self._echo:
            answer = self._complete(prompts, prompt_logprobs=self.top_k)
            if all("prompt_logprobs" in choice for choice in answer):
                return [
                    _by_id(choice["prompt_logprobs"], prompt) for choice, prompt in zip(answer, prompts, strict=True)
                ]
        self._echo = True
        answer = self._complete(prompts, echo=True, logprobs=self.top_k, return_tokens_as_token_ids=True)
        return [_echoed(choice.get("logprobs"), prompt) for choice, prompt in zip(answer, prompts, strict=True)]

    def _complete(
        self, prompts: Sequence[list[int]], timeout: float | None = None, **options: Any
    ) -> list[dict[str, Any]]:
        body = {"model": self._model, "prompt": prompts, "max_tokens": 1, "temperature": 0, **options}
        choices = request(f"{self._base}/completions", body, timeout).get("choices")
        if not isinstance(choices, list) or len(choices) != len(prompts):
            raise _wrong(f"{len(prompts)} prompts were sent, and not as many answered")
        return sorted(choices, key=lambda choice: choice.get("index", 0))

    def _outputs(self, row: Sequence[int], answer: Sequence[Mapping[int, float]]) -> ServedOutputs:
        size = 1 + max(self.tokenizer.get_vocab().values())
        width = max(map(len, answer), default=1)
        tokens, probs = torch.zeros(len(answer), width, dtype=torch.int64), torch.zeros(len(answer), width)
        own = torch.empty(len(answer))
        for place, (told, token) in enumerate(zip(answer, row[1:], strict=True)):
            own[place] = told[token]
            known = {other: value for other, value in told.items() if other < size}
            tokens[place, : len(known)] = torch.tensor(list(known))
            probs[place, : len(known)] = torch.tensor(list(known.values())).exp()
        if not bool((probs.sum(-1) <= 1 + ROUNDING).all()):
            raise _wrong("the probabilities of a token come to more than 1")
        return ServedOutputs(tokens.to(self._device), probs.to(self._device), own.to(self._device), size)


def _without_end(text: str, ends: Sequence[str]) -> str:
    """An answer without the token that ended it, which a server may write where it is no special one."""
    text = text.strip()
    for end in ends:
        text = text.removesuffix(end)
    return text.strip()


@dataclass(frozen=True, slots=True)
class ServedOutputs:
    """What a server has told of a row of L tokens.

    Attributes:
        tokens: ``(L - 1, w)``: after each token but the last, those that are told.
        probs: ``(L - 1, w)``: theirs; 0 where fewer are told.
        own: ``(L - 1,)``: log-likelihoods of the row's own next tokens.
        vocabulary: Size of the teacher's.
    """

    tokens: Tensor
    probs: Tensor
    own: Tensor
    vocabulary: int

    def probabilities(self, rows: Tensor, temperature: float) -> TokenDistribution:
        """See `Outputs`.

        Raises:
            ValueError: If ``temperature`` is not 1: what was not told cannot be warmed.
        """
        if temperature != 1:
            raise ValueError(f"temperature is {temperature}; a server's probabilities are those at 1")
        told = self.probs[rows]
        probs = told.new_zeros(len(rows), self.vocabulary).scatter_add_(1, self.tokens[rows], told)
        return TokenDistribution(probs, self.own[rows], (1 - told.sum(-1)).clamp(min=0))


def find_server(address: str, tokenizer: PreTrainedTokenizerBase, top_k: int) -> ServedTeacher:
    """Find the model of a server.

    Args:
        address: ``http://host:port/v1``, and ``#model`` behind it where the server has several.
        tokenizer: The model's own.
        top_k: Tokens that it is to tell.

    Raises:
        ConfigError: If the server has no such model, or several.
        TrainingError: If it does not answer.
    """
    base, _, wanted = address.rstrip("/").partition("#")
    base = base.rstrip("/") if base.rstrip("/").endswith("/v1") else f"{base.rstrip('/')}/v1"
    listed = request(f"{base}/models", pauses=PAUSES[:1]).get("data")  # nobody has begun to wait yet
    if not isinstance(listed, list) or not all(isinstance(model, dict) and "id" in model for model in listed):
        raise _wrong("it lists no models")
    models = {str(model["id"]): model for model in listed}
    if (wanted and wanted not in models) or (not wanted and len(models) != 1):
        raise ConfigError(
            f"--teacher {address}: the server has {', '.join(models) or 'no models'}.",
            expected="one of its models" if wanted else "the name of one behind the address",
            fix=f"--teacher {base}#{next(iter(models), 'MODEL')}",
        )
    name = wanted or next(iter(models))
    return ServedTeacher(f"{name} at {base}", tokenizer, models[name].get("max_model_len"), top_k, base, name)


def request(
    url: str, body: Mapping[str, Any] | None = None, timeout: float | None = None, pauses: Sequence[float] | None = None
) -> dict[str, Any]:
    """Ask a server for JSON, several times if it is busy or cannot be reached.

    Args:
        url: Of the endpoint.
        body: What to post; nothing gets.
        timeout: Seconds that an answer may take, where it is not `TIMEOUT`.
        pauses: Before it is asked again, where they are not `PAUSES`.

    Raises:
        TrainingError: If it does not answer, refuses, or answers something else than JSON.
    """
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get(KEY_VARIABLE):
        headers["Authorization"] = f"Bearer {key}"
    asked = urllib.request.Request(url, json.dumps(body).encode() if body is not None else None, headers)
    opener = urllib.request.build_opener(_NoRedirects)
    for pause in (*(PAUSES if pauses is None else pauses), None):
        try:
            with opener.open(asked, timeout=timeout or TIMEOUT) as answer:
                return dict(json.loads(answer.read()))
        except urllib.error.HTTPError as error:
            if pause is None or not (error.code == 429 or error.code >= 500):
                raise _refused(url, error, key) from None  # the request, within the error, holds the key
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            if pause is None:
                raise TrainingError(
                    f"The server at {url} does not answer: {getattr(error, 'reason', error)}.",
                    fix="start it, correct --teacher, or start again: what was captured is kept",
                ) from None
        except (ValueError, TypeError):
            raise _wrong("it is not JSON") from None
        time.sleep(pause)
    raise AssertionError("the last try ends")


def _refused(url: str, error: urllib.error.HTTPError, key: str | None) -> TrainingError:
    with error:
        said = error.read(2000).decode("utf-8", "replace").strip()
    if key:
        said = said.replace(key, "…")
    if error.code in (401, 403):
        return TrainingError(
            f"The server at {url} wants a key ({error.code})." if not key else f"The server at {url} refuses the key.",
            fix=f"put it into the environment variable {KEY_VARIABLE}",
        )
    fix = "start vLLM with a higher --max-logprobs, or a lower --top-k" if "logprob" in said else ""
    return TrainingError(f"The server at {url} answers {error.code}: {said[:300]}", fix=fix)


def _wrong(what: str) -> TrainingError:
    return TrainingError(
        f"The server's answer cannot be used: {what}.",
        expected="an OpenAI-compatible server that gives the log-probabilities of a prompt's tokens: vLLM's",
    )


def _by_id(told: Any, prompt: Sequence[int]) -> list[Mapping[int, float]]:
    """VLLM's ``prompt_logprobs``: a mapping from ids to what is told of them, for each token but the first."""
    try:
        found = [{int(token): float(one["logprob"]) for token, one in place.items()} for place in told[1:]]
    except (TypeError, ValueError, KeyError, AttributeError):
        raise _wrong("its prompt_logprobs are of another form") from None
    return _checked(found, prompt)


def _echoed(told: Any, prompt: Sequence[int]) -> list[Mapping[int, float]]:
    """OpenAI's echoed ``logprobs``, with tokens written as their ids."""
    try:
        found = []
        for place in range(1, len(prompt)):
            likeliest = {_id(token): float(value) for token, value in told["top_logprobs"][place].items()}
            found.append(likeliest | {_id(told["tokens"][place]): float(told["token_logprobs"][place])})
    except (TypeError, ValueError, KeyError, IndexError, AttributeError):
        raise _wrong("it neither has prompt_logprobs nor echoes tokens as their ids") from None
    return _checked(found, prompt)


def _id(token: str) -> int:
    if not token.startswith(TOKEN_ID):
        raise ValueError(token)
    return int(token.removeprefix(TOKEN_ID))


def _checked(found: Sequence[Mapping[int, float]], prompt: Sequence[int]) -> list[Mapping[int, float]]:
    if len(found) != len(prompt) - 1 or any(token not in told for told, token in zip(found, prompt[1:], strict=True)):
        raise _wrong("it is about other tokens than were sent")
    if any(not value <= 0 or math.isnan(value) for told in found for value in told.values()):
        raise _wrong("it has log-probabilities above 0")
    return list(found)

"""A teacher behind an OpenAI-compatible server, such as vLLM's, which returns its top-k tokens only.

This biases the targets. The mass outside the top-k counts as "any token outside the support", although some of it
belongs to student tokens inside the support. These get too little probability and all others too much, by at most that
mass. The bias is largest within a teacher token, where the missing tokens include many that cannot follow. Span
likelihoods have no bias, because the server always returns the log-likelihood of a row's actual tokens.
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
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase

from hymba_tune.distill.outputs import HeadOutputs, TokenDistribution
from hymba_tune.distill.teacher import batches
from hymba_tune.errors import ConfigError, TrainingError

KEY_VARIABLE = "HYMBA_TUNE_TEACHER_KEY"
"""Environment variable with the server's key. It is sent to that server only, and never shown."""
TIMEOUT = 120.0
"""Seconds to wait for a response."""
WRITING_TIMEOUT = 1200.0
"""Seconds to wait for a response with generated text."""
PAUSES = (1.0, 4.0, 16.0)
"""Seconds before each retry of a request."""
BATCH_ROWS = 32
"""The most rows in a request: servers accept so many texts at once, `hymba-tune serve` as many as its --queue."""
BATCH_TOKENS = 4096
"""Prompt tokens in one request."""
ROUNDING = 0.01
"""Tolerance of a sum of probabilities above 1."""
TOKEN_ID = "token_id:"
BIAS = "a server returns its top {k} tokens: the remaining mass counts as any token outside them"


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Follows no redirects, because another address must not receive the key."""

    def redirect_request(self, *_: Any) -> None:
        """Return no new request."""


@dataclass
class ServedTeacher:
    """A model behind a server, which is both a `Teacher` and a `TeacherSpec`.

    Attributes:
        name: The model's name and its address.
        tokenizer: The model's tokenizer, which comes from elsewhere: a server does not return it.
        context: The maximum number of tokens in a row; None if the server does not say.
        top_k: The number of tokens that the server returns at each position.
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
        """A digest of the model's name on the server and of ``top_k``."""
        return hashlib.sha256(json.dumps([self._model, self.top_k]).encode()).hexdigest()

    @property
    def bias(self) -> str:
        """The bias of its targets, in words."""
        return BIAS.format(k=self.top_k)

    def load(self, device: torch.device, dtype: torch.dtype) -> ServedTeacher:
        """Return this teacher: the server holds the weights."""
        del dtype
        self._device = device
        return self

    def outputs(self, rows: Sequence[Sequence[int]]) -> Iterator[tuple[int, ServedOutputs]]:
        """Read rows; see `Teacher`.

        Raises:
            TrainingError: If the server does not answer, or its answer cannot be used.
        """
        for batch in batches([len(row) for row in rows], BATCH_TOKENS, BATCH_ROWS):
            answers = self._request([list(rows[index]) for index in batch])
            for index, answer in zip(batch, answers, strict=True):
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

    def _request(self, prompts: list[list[int]]) -> list[list[Mapping[int, float]]]:
        """Return log-probabilities by token id for each position but the first, including the actual token."""
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
            raise _wrong(f"{len(prompts)} prompts were sent, and the number of choices is another")
        return sorted(choices, key=lambda choice: choice.get("index", 0))

    def _outputs(self, row: Sequence[int], answer: Sequence[Mapping[int, float]]) -> ServedOutputs:
        size = 1 + max(self.tokenizer.get_vocab().values())
        width = max(map(len, answer), default=1)
        tokens = torch.zeros(len(answer), width, dtype=torch.int64)
        probs = torch.zeros(len(answer), width)
        own = torch.empty(len(answer))
        for place, (log_probs, token) in enumerate(zip(answer, row[1:], strict=True)):
            own[place] = log_probs[token]
            known = {other: value for other, value in log_probs.items() if other < size}
            tokens[place, : len(known)] = torch.tensor(list(known))
            probs[place, : len(known)] = torch.tensor(list(known.values())).exp()
        if not bool((probs.sum(-1) <= 1 + ROUNDING).all()):
            raise _wrong("the probabilities of a token sum to more than 1")
        return ServedOutputs(tokens.to(self._device), probs.to(self._device), own.to(self._device), size)


def _without_end(text: str, ends: Sequence[str]) -> str:
    """Remove the end token, which a server may include in the text if it is not a special token."""
    text = text.strip()
    for end in ends:
        text = text.removesuffix(end)
    return text.strip()


@dataclass(frozen=True, slots=True)
class ServedOutputs:
    """A server's outputs for a row of L tokens.

    Attributes:
        tokens: ``(L - 1, w)``: the top-k tokens after each token but the last.
        probs: ``(L - 1, w)``: the probabilities of these; 0 where the server returned fewer.
        own: ``(L - 1,)``: the log-likelihoods of the row's actual next tokens.
        vocabulary: The size of the teacher's vocabulary.
    """

    tokens: Tensor
    probs: Tensor
    own: Tensor
    vocabulary: int

    def __len__(self) -> int:
        return len(self.own)

    @classmethod
    def joined(cls, rows: Sequence[Self]) -> Self:
        """Join rows of one server; see `Outputs`."""
        width = max(row.tokens.shape[1] for row in rows)
        tokens, probs = (
            torch.cat([pad(part, (0, width - part.shape[1])) for part in parts])
            for parts in ([row.tokens for row in rows], [row.probs for row in rows])
        )
        return cls(tokens, probs, torch.cat([row.own for row in rows]), rows[0].vocabulary)

    def probabilities(self, rows: Tensor, temperature: float) -> TokenDistribution:
        """Return next-token distributions; see `Outputs`.

        Raises:
            ValueError: If ``temperature`` is not 1, which needs the logits of all tokens.
        """
        if temperature != 1:
            raise ValueError(f"temperature is {temperature}; a server's probabilities are those at 1")
        top = self.probs[rows]
        probs = top.new_zeros(len(rows), self.vocabulary).scatter_add_(1, self.tokens[rows], top)
        return TokenDistribution(probs, self.own[rows], (1 - top.sum(-1)).clamp(min=0))


def find_server(address: str, tokenizer: PreTrainedTokenizerBase, top_k: int) -> ServedTeacher:
    """Find the model of a server.

    Args:
        address: ``http://host:port/v1``, followed by ``#model`` if the server has several models.
        tokenizer: The model's tokenizer.
        top_k: The number of tokens that the server returns at each position.

    Raises:
        ConfigError: If the server has no such model, or several.
        TrainingError: If it does not answer.
    """
    base, _, wanted = address.rstrip("/").partition("#")
    base = base.rstrip("/") if base.rstrip("/").endswith("/v1") else f"{base.rstrip('/')}/v1"
    listed = request(f"{base}/models", pauses=PAUSES[:1]).get("data")  # a wrong address must fail soon
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
    """Request JSON from a server, with retries if it is busy or cannot be reached.

    Args:
        url: The address of the endpoint.
        body: The JSON to post; None sends a GET request.
        timeout: Seconds to wait for a response; None uses `TIMEOUT`.
        pauses: Seconds before each retry; None uses `PAUSES`.

    Raises:
        TrainingError: If the server does not answer, refuses, or does not return JSON.
    """
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get(KEY_VARIABLE):
        headers["Authorization"] = f"Bearer {key}"
    message = urllib.request.Request(url, json.dumps(body).encode() if body is not None else None, headers)
    opener = urllib.request.build_opener(_NoRedirects)
    for pause in (*(PAUSES if pauses is None else pauses), None):
        try:
            with opener.open(message, timeout=timeout or TIMEOUT) as answer:
                return dict(json.loads(answer.read()))
        except urllib.error.HTTPError as error:
            with error:
                if pause is None or not (error.code == 429 or error.code >= 500):
                    raise _refused(url, error, key) from None  # the request, within the error, holds the key
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            if pause is None:
                raise TrainingError(
                    f"The server at {url} does not answer: {getattr(error, 'reason', error)}.",
                    fix="start it, correct --teacher, or start again: captured targets are kept",
                ) from None
        except (ValueError, TypeError):
            raise _wrong("it is not JSON") from None
        time.sleep(pause)
    raise AssertionError("the last try ends")


def _refused(url: str, error: urllib.error.HTTPError, key: str | None) -> TrainingError:
    text = error.read(2000).decode("utf-8", "replace").strip()
    if key:
        text = text.replace(key, "…")
    if error.code in (401, 403):
        return TrainingError(
            f"The server at {url} wants a key ({error.code})." if not key else f"The server at {url} refuses the key.",
            fix=f"put it into the environment variable {KEY_VARIABLE}",
        )
    fix = "start vLLM with a higher --max-logprobs, or a lower --top-k" if "logprob" in text else ""
    return TrainingError(f"The server at {url} answers {error.code}: {text[:300]}", fix=fix)


def _wrong(reason: str) -> TrainingError:
    return TrainingError(
        f"The server's answer cannot be used: {reason}.",
        expected="an OpenAI-compatible server that returns log-probabilities of prompt tokens, such as vLLM",
    )


def _by_id(logprobs: Any, prompt: Sequence[int]) -> list[Mapping[int, float]]:
    """Read vLLM's ``prompt_logprobs``: a mapping by token id for each position but the first."""
    try:
        positions = [{int(token): float(one["logprob"]) for token, one in place.items()} for place in logprobs[1:]]
    except (TypeError, ValueError, KeyError, AttributeError):
        raise _wrong("its prompt_logprobs have another form") from None
    return _checked(positions, prompt)


def _echoed(logprobs: Any, prompt: Sequence[int]) -> list[Mapping[int, float]]:
    """Read OpenAI's echoed ``logprobs``, with tokens written as their ids."""
    try:
        positions = []
        for place in range(1, len(prompt)):
            top = {_id(token): float(value) for token, value in logprobs["top_logprobs"][place].items()}
            positions.append(top | {_id(logprobs["tokens"][place]): float(logprobs["token_logprobs"][place])})
    except (TypeError, ValueError, KeyError, IndexError, AttributeError):
        raise _wrong("it neither has prompt_logprobs nor echoes tokens as their ids") from None
    return _checked(positions, prompt)


def _id(token: str) -> int:
    if not token.startswith(TOKEN_ID):
        raise ValueError(token)
    return int(token.removeprefix(TOKEN_ID))


def _checked(positions: Sequence[Mapping[int, float]], prompt: Sequence[int]) -> list[Mapping[int, float]]:
    if len(positions) != len(prompt) - 1 or any(
        token not in log_probs for log_probs, token in zip(positions, prompt[1:], strict=True)
    ):
        raise _wrong("it is about other tokens than were sent")
    if any(not value <= 0 or math.isnan(value) for log_probs in positions for value in log_probs.values()):
        raise _wrong("it has log-probabilities above 0")
    return list(positions)

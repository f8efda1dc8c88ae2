"""A server under load: prompts in chunks, memory, prefixes that are reused, and metrics."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import psutil
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from hymba_tune import memory
from hymba_tune.checkpoint import load_tokenizer
from hymba_tune.config import ServeConfig
from hymba_tune.data import with_chat_template
from hymba_tune.errors import ConfigError
from hymba_tune.serve import Server
from hymba_tune.serve.reading import Limits, RequestReader
from hymba_tune.serve.turns import Turns
from tests.serve.servers import QUESTION, raw, serving, wait_until_free, working

SYSTEM = {"role": "system", "content": "You count animals, and you do so with great care. " * 6}
FIRST = [SYSTEM, *QUESTION]
MEGABYTE = 2**-10
"""In the unit of the flags, gigabytes."""


@pytest.fixture(scope="module")
def kept(small_model: Path) -> Iterator[Server]:
    with serving(small_model, prefix_memory=50 * MEGABYTE, prefill_chunk=16) as server:
        yield server


@pytest.fixture(scope="module")
def client(kept: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=kept.url, api_key="none", max_retries=0, timeout=300) as client:
        yield client


def metrics(server: Server) -> dict[str, float]:
    families = text_string_to_metric_families(raw(server, "GET", "/metrics")[1])
    return {
        "".join([sample.name, *(f" {value}" for value in sample.labels.values())]): sample.value
        for family in families
        for sample in family.samples
    }


def test_chats_that_begin_alike_are_computed_once(kept: Server, client: openai.OpenAI, small_model: Path) -> None:
    """The answers are those of a server that keeps nothing."""
    settings: dict[str, Any] = {"model": kept.name, "max_tokens": 6, "temperature": 0}
    settings |= {"logprobs": True, "top_logprobs": 5}

    def talk(client: openai.OpenAI) -> tuple[list[Any], list[int]]:
        chats: list[list[Any]] = [FIRST]
        responses = [client.chat.completions.create(messages=chats[0], **settings)]
        chats.append([*FIRST, responses[0].choices[0].message, {"role": "user", "content": "And then?"}])
        chats.append([SYSTEM, {"role": "user", "content": "How many legs has a cow?"}])
        responses += [client.chat.completions.create(messages=chat, **settings) for chat in chats[1:]]
        reused = [response.usage.prompt_tokens_details.cached_tokens for response in responses]  # type: ignore[union-attr]
        return [response.choices for response in responses], reused

    answers, reused = talk(client)
    with (
        serving(small_model, prefix_memory=0, prefill_chunk=16) as forgetful,
        openai.OpenAI(base_url=forgetful.url, api_key="none", max_retries=0, timeout=300) as other,
    ):
        assert talk(other) == (answers, [0, 0, 0])
    assert reused[0] == 0
    assert reused[1] > reused[2] > 60
    counted = metrics(kept)
    assert counted["hymba_reused_prompt_tokens_total"] == sum(reused)
    assert 0 < counted["hymba_prefix_bytes"] <= 50 * 2**20


def test_metrics_count_what_happened(kept: Server, client: openai.OpenAI) -> None:
    before = metrics(kept)
    response = client.completions.create(model=kept.name, prompt=["I see two", "I see"], max_tokens=3)
    raw(kept, "GET", "/no/such/route")
    wait_until_free(kept)
    after = metrics(kept)
    grown = {name: value - before.get(name, 0) for name, value in after.items()}
    assert response.usage is not None
    assert grown["hymba_prompt_tokens_total"] == response.usage.prompt_tokens
    assert grown["hymba_generated_tokens_total"] == response.usage.completion_tokens
    assert grown["hymba_texts_total length"] + grown.get("hymba_texts_total stop", 0) == 2
    assert grown["hymba_requests_total /v1/completions 200"] == grown["hymba_requests_total other 404"] == 1
    assert grown["hymba_time_to_first_token_seconds_count"] == grown["hymba_text_seconds_count"] == 2
    assert after["hymba_running_texts"] == after["hymba_waiting_texts"] == after["hymba_cache_bytes"] == 0


def test_the_context_is_what_the_memory_allows(small_model: Path) -> None:
    with serving(small_model, cache_memory=0.04 * MEGABYTE, max_new_tokens=8) as server:
        _, cards = raw(server, "GET", "/v1/models")
        context = cards["data"][0]["max_model_len"]
        assert 100 < context < 512
        body = {"model": server.name, "prompt": [5] * context, "max_tokens": 8}
        status, error = raw(server, "POST", "/v1/completions", json.dumps(body).encode())
        assert status == 400
        assert "This model's maximum context length is" in error["error"]["message"]
        fitting = body | {"prompt": [5] * (context - 8), "n": 3}
        assert raw(server, "POST", "/v1/completions", json.dumps(fitting).encode())[0] == 200
        assert server.worker.largest_batch == 1


def test_a_memory_for_nothing_is_refused(small_model: Path) -> None:
    with pytest.raises(ConfigError, match="--cache-memory 1e-06: the cache of a text of two tokens does not fit"):
        Server(ServeConfig(model=str(small_model), port=0, cache_memory=1e-6), working)


@pytest.mark.parametrize("template", ["hymba", "alpaca"])
def test_turns_of_a_chat_are_found(small_model: Path, template: str) -> None:
    """The prompt of a turn ends where the next turn's is cut."""
    tokenizer = with_chat_template(load_tokenizer(small_model), template)
    reader = RequestReader("m", tokenizer, Limits(context=2000, new_tokens=9, texts=1, body=2**16))
    messages: list[dict[str, str]] = [SYSTEM]
    ends: list[int] = []
    for number in range(3):
        messages.append({"role": "user", "content": f"Question {number}?"})
        _, (one,) = reader.chat(json.dumps({"model": "m", "messages": messages}).encode())
        assert one.cuts[1:] == tuple(ends)
        assert "with great care. " in tokenizer.decode(one.prompt[: one.cuts[0]])
        assert "Question" not in tokenizer.decode(one.prompt[: one.cuts[0]])
        ends.append(len(one.prompt))
        messages.append({"role": "assistant", "content": f"Answer {number}"})


def test_a_template_that_refuses_the_probe_has_no_known_turns(small_model: Path) -> None:
    tokenizer = with_chat_template(load_tokenizer(small_model))
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert Turns.of(tokenizer) == Turns()
    assert Turns().cuts("any text") == []


def test_free_memory_is_the_least_of_machine_and_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2000 * 1024))
    monkeypatch.setattr(memory, "CONTAINER", tmp_path)
    cpu = torch.device("cpu")
    assert memory.free_memory(cpu) == 2000 * 1024
    (tmp_path / "memory.current").write_text("300\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_memory(cpu) == 2000 * 1024
    (tmp_path / "memory.max").write_text("1000\n")
    assert memory.free_memory(cpu) == 700

"""Prompts in chunks, and prefixes that are reused: the same texts, to the bit where the same prompts share a chunk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hymba_tune.generate import ChunkedDecoder, Generation, Sampling
from hymba_tune.generate.chunked import chunk_ends
from hymba_tune.generate.prefixes import Prefix, PrefixStore
from tests.tiny import random_texts, tiny_model

SYSTEM, FIRST, SECOND, OTHER, LONG = [text.tolist() for text in random_texts([17, 9, 6, 12, 40])]
ENDLESS = 10**9


class NoText:
    """A tokenizer of texts that do not matter and never end."""

    eos_token_id = -1

    def decode(self, *_: Any, **__: Any) -> str:
        return ""


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model(torch.float64)


def decode(decoder: ChunkedDecoder, *generations: Generation) -> None:
    decoder.add(generations)
    while decoder.active:
        decoder.step()
    assert [one.error for one in generations] == [None] * len(generations)


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@given(length=st.integers(1, 60), cuts=st.lists(st.integers(0, 70), unique=True).map(sorted), chunk=st.integers(1, 70))
def test_ends_of_chunks_depend_on_the_beginning_alone(length: int, cuts: list[int], chunk: int) -> None:
    ends = chunk_ends(length, cuts, chunk)
    assert ends[-1] == length
    assert {cut for cut in cuts if 0 < cut < length} <= {*ends}
    assert all(0 < b - a <= chunk for a, b in zip((0, *ends), ends, strict=False))
    longer = chunk_ends(length + 9, sorted({*cuts, length}), chunk)
    if not any(cut > length for cut in cuts):
        assert longer[: len(ends)] == ends


@pytest.mark.parametrize("chunk", [7, 100])
@pytest.mark.parametrize("prefix_bytes", [0, ENDLESS])
def test_chunks_change_no_text(model: Any, chunk: int, prefix_bytes: int) -> None:
    decoder = ChunkedDecoder(model, NoText(), chunk=chunk, prefix_bytes=prefix_bytes)  # type: ignore[arg-type]
    prompts = [SYSTEM + FIRST, LONG, [5], SYSTEM + SECOND, SYSTEM + FIRST]
    counts = [5, 3, 8, 1, 6]
    generations = [Generation(p, n, cuts=(17,)) for p, n in zip(prompts, counts, strict=True)]
    decoder.add(generations[:3])
    for _ in range(3):
        decoder.step()
    decode(decoder, *generations[3:])
    for one, prompt, count in zip(generations, prompts, counts, strict=True):
        assert one.ids == greedy(model, prompt, count)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [5, 64])
def test_reuse_is_exact_to_the_bit(dtype: torch.dtype, chunk: int) -> None:
    """A chat of three turns, another chat with its system prompt, and the last turn once more."""
    model = tiny_model(dtype)
    answers = [[7, 8, 9], [10, 11]]
    turns = [SYSTEM + FIRST, SYSTEM + FIRST + answers[0] + SECOND]
    turns.append(turns[1] + answers[1] + OTHER)
    cuts = (len(SYSTEM), *map(len, turns))

    def scores(decoders: Callable[[], ChunkedDecoder]) -> tuple[list[Any], list[int]]:
        results, reused = [], []
        for prompt in [*turns, SYSTEM + OTHER, turns[2]]:
            one = Generation(prompt, 4, top=20, cuts=tuple(cut for cut in cuts if cut < len(prompt)))
            if prompt == SYSTEM + OTHER:
                one.cuts = (len(SYSTEM),)
            decode(decoders(), one)
            results.append(one.scores)
            reused.append(one.reused)
        return results, reused

    keeping = ChunkedDecoder(model, NoText(), chunk=chunk, prefix_bytes=ENDLESS)  # type: ignore[arg-type]
    with_reuse, reused = scores(lambda: keeping)
    without, none = scores(lambda: ChunkedDecoder(model, NoText(), chunk=chunk))  # type: ignore[arg-type]
    assert with_reuse == without
    assert reused == [0, len(turns[0]), len(turns[1]), len(SYSTEM), len(turns[2])]
    assert none == [0] * 5


def test_a_shared_beginning_is_found_without_being_marked(model: Any) -> None:
    decoder = ChunkedDecoder(model, NoText(), chunk=8, prefix_bytes=ENDLESS)  # type: ignore[arg-type]
    generations = [Generation(SYSTEM + rest, 1) for rest in (FIRST, SECOND, OTHER)]
    for one in generations:
        decode(decoder, one)
    assert [one.reused for one in generations] == [0, 0, 16]


def test_equal_prompts_are_computed_once(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []
    compute = ChunkedDecoder._compute_together

    def counting(self: ChunkedDecoder, prompts: list[Any]) -> None:
        computed.extend(len(one.chunk) for one in prompts)
        compute(self, prompts)

    monkeypatch.setattr(ChunkedDecoder, "_compute_together", counting)
    decoder = ChunkedDecoder(model, NoText(), prefix_bytes=ENDLESS)  # type: ignore[arg-type]
    generations = [Generation(LONG, 6, Sampling(1.0, seed=seed)) for seed in range(4)]
    decode(decoder, *generations)
    assert computed == [len(LONG)]
    assert len({tuple(one.ids) for one in generations}) > 1


def test_no_step_computes_more_than_a_chunk(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks: list[int] = []
    compute = ChunkedDecoder._compute_together

    def counting(self: ChunkedDecoder, prompts: list[Any]) -> None:
        chunks.append(sum(len(one.chunk) for one in prompts))
        compute(self, prompts)

    monkeypatch.setattr(ChunkedDecoder, "_compute_together", counting)
    decoder = ChunkedDecoder(model, NoText(), chunk=10)  # type: ignore[arg-type]
    first = Generation([5], 12)
    decoder.add([first])
    decoder.step()
    decoder.add([Generation(LONG, 2), Generation(OTHER, 2), Generation([6, 7], 2), Generation([8], 2)])
    for tokens in range(3, 9):
        decoder.step()
        assert len(first.ids) == tokens  # it gets a token in every step
    assert chunks == [1, 10, 10, 10, 10, 10, 5]


def test_a_prompt_that_fails_ends_alone(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = type(model).forward

    def limited(self: Any, input_ids: Any, **others: Any) -> Any:
        if 60 in input_ids:
            raise torch.OutOfMemoryError("out of memory")
        return forward(self, input_ids, **others)

    monkeypatch.setattr(type(model), "forward", limited)
    decoder = ChunkedDecoder(model, NoText())  # type: ignore[arg-type]
    good, bad = Generation([5, 6], 3), Generation([7, 60], 3)
    decoder.add([good, bad])
    while decoder.active:
        decoder.step()
    assert isinstance(bad.error, torch.OutOfMemoryError)
    assert good.ids == greedy(model, [5, 6], 3)


def test_a_prompt_can_be_dropped_while_it_is_computed(model: Any) -> None:
    decoder = ChunkedDecoder(model, NoText(), chunk=8)  # type: ignore[arg-type]
    long, short = Generation(LONG, 5), Generation(OTHER, 3)
    decoder.add([long, short])
    decoder.step()
    decoder.drop(long)
    while decoder.active:
        decoder.step()
    assert (long.ids, long.finish_reason) == ([], "length")
    assert short.ids == greedy(model, OTHER, 3)


def test_the_store_stays_within_its_budget_and_forgets_the_oldest(model: Any) -> None:
    with torch.no_grad():
        cache = model(torch.tensor([LONG[:3]]), use_cache=True).past_key_values.text(0)
    one = Prefix(3, cache, torch.zeros(61))
    store = PrefixStore(2 * one.nbytes)
    prompts = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    for prompt in prompts[:2]:
        store.keep(prompt, one)
    assert store.find([*prompts[0], 9], (3, 4)) is one
    store.keep(prompts[2], one)
    assert store.nbytes == 2 * one.nbytes
    assert [store.find(prompt, (3,)) for prompt in prompts] == [one, None, one]
    small = PrefixStore(one.nbytes - 1)
    small.keep(prompts[0], one)
    assert small.nbytes == 0


@pytest.mark.parametrize("length", [3, 30])
def test_the_estimate_of_a_cache_is_its_size(model: Any, length: int) -> None:
    decoder = ChunkedDecoder(model, NoText(), chunk=100)  # type: ignore[arg-type]
    generations = [Generation(LONG[:length], 20), Generation(LONG[: length - 1], 10)]
    estimate = decoder.nbytes_of(generations)
    decoder.add(generations)
    largest = 0
    while decoder.active:
        decoder.step()
        largest = max(largest, decoder.nbytes)
    assert largest <= estimate <= 1.6 * largest
    assert decoder.nbytes == decoder.nbytes_of([]) == 0

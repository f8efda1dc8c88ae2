"""Steps that are replayed as graphs give the tokens of steps without them, on memory that stays where it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hymba_tune.errors import ConfigError
from hymba_tune.generate import ChunkedDecoder, Decoder, Generation, Sampling, generate_texts
from hymba_tune.generate.batches import GraphBatch, bucket
from hymba_tune.generate.choosing import Chooser
from hymba_tune.model.step_graphs import CaptureError, StepGraphs
from tests.generate.letters import END, PROMPTS, Letters
from tests.recorded import Graph
from tests.tiny import tiny_model

SAMPLINGS = [
    Sampling(),
    Sampling(1.2, seed=3, top_p=0.9, top_k=20),
    Sampling(0.8, seed=4, min_p=0.05, repetition_penalty=1.3, logit_bias={5: 1.0}),
    Sampling(frequency_penalty=0.6),
    Sampling(1.0, seed=5),
]
COUNTS = [9, 3, 14, 20, 6]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model(torch.float64)


def texts() -> list[Generation]:
    rows = zip(PROMPTS, COUNTS, SAMPLINGS, strict=True)
    return [Generation(prompt, n, one, top=2 if n == 9 else None) for prompt, n, one in rows]


def results(generations: list[Generation]) -> list[Any]:
    return [(one.ids, one.finish_reason, [score.top for score in one.scores]) for one in generations]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_replayed_steps_give_the_tokens_of_steps_without_graphs(
    model: Any, graphs: list[Graph], batch_size: int
) -> None:
    """Texts of all kinds join and leave, so that steps of several buckets are captured."""
    expected, actual = texts(), texts()
    list(generate_texts(model, Letters(), expected, batch_size=batch_size))
    assert not graphs
    list(generate_texts(model, Letters(), actual, batch_size=batch_size, cuda_graphs=True))
    assert graphs
    for one, other in zip(results(actual), results(expected), strict=True):
        assert one[:2] == other[:2]
        assert [[token for token, _ in top] for top in one[2]] == [[token for token, _ in top] for top in other[2]]


def test_a_server_with_graphs_gives_the_same_tokens(model: Any, graphs: list[Graph]) -> None:
    def decode(decoder: ChunkedDecoder) -> list[Any]:
        generations = texts()
        for one in generations:
            decoder.add([one])
            decoder.step()
        while decoder.active:
            decoder.step()
        return [row[:2] for row in results(generations)]

    tokenizer: Any = Letters()
    expected = decode(ChunkedDecoder(model, tokenizer, chunk=8, prefix_bytes=2**30))
    decoder = ChunkedDecoder(model, tokenizer, chunk=8, prefix_bytes=2**30, cuda_graphs=True)
    assert decode(decoder) == expected
    captured = len(graphs)
    assert decode(decoder) == expected
    assert len(graphs) - captured < captured  # those of the first texts are used again
    decoder.reset()
    assert decoder.nbytes == 0


def addresses(decoder: Decoder) -> list[int]:
    cache = decoder._batch.cache
    assert cache is not None
    tensors = [cache.lengths, decoder._chooser._rows, decoder._chooser._last, decoder._chooser._noise]
    return [x.data_ptr() for x in (*tensors, *(x for group in cache._by_text for x in group.values())) if x is not None]


def test_buffers_stay_where_they_are_and_a_step_makes_none_of_their_size(model: Any, graphs: list[Graph]) -> None:
    decoder = Decoder(model, Letters(), cuda_graphs=True)  # type: ignore[arg-type]
    generations = [Generation(prompt, 40, Sampling(1.0, seed=1)) for prompt in PROMPTS[:4]]
    decoder.add(generations)
    before = addresses(decoder)
    for _ in range(12):
        decoder.step()
    decoder.drop(generations[0])
    decoder.step()
    decoder.add([Generation(PROMPTS[1], 40)])
    decoder.step()
    assert addresses(decoder) == before
    assert decoder._batch.cache is not None
    shapes = {x.shape for group in decoder._batch.cache._by_text[:2] for x in group.values()}
    assert graphs
    assert not shapes & {x.shape for graph in graphs for x in graph.allocated}


def test_a_longer_text_moves_the_batch_into_longer_slots(model: Any, graphs: list[Graph]) -> None:
    assert not graphs
    short, long = Generation(PROMPTS[0], 30), Generation(PROMPTS[1], 300)
    decoder = Decoder(model, Letters(), cuda_graphs=True)  # type: ignore[arg-type]
    decoder.add([short])
    for _ in range(4):
        decoder.step()
    cache = decoder._batch.cache
    assert cache is not None
    assert [key.shape[2] for key in cache.keys.values()] == [256, 6, 256]
    decoder.add([long])
    assert decoder._batch.cache is not cache
    for _ in range(8):
        decoder.step()
    expected = [replace(one, ids=[], finish_reason=None) for one in (short, long)]
    list(generate_texts(model, Letters(), expected, batch_size=2))
    for one, whole in zip((short, long), expected, strict=True):
        assert len(one.ids) > 8 or one.ids[-1] == END
        assert whole.ids[: len(one.ids)] == one.ids


@pytest.mark.parametrize(("limit", "size"), [(2**62, (4, 512)), (0, (1, 512))])
def test_sizes_only_grow_while_they_fit_into_memory(model: Any, limit: int, size: tuple[int, int]) -> None:
    batch = GraphBatch(model.config, limit)
    prefilled = model(torch.tensor(PROMPTS[:1]), use_cache=True).past_key_values
    with torch.inference_mode():
        batch.join([prefilled] * 3, 3, 100)
        batch.keep([])
        assert batch.join([prefilled], 1, 400) == size[0]
    assert batch.cache is not None
    assert (batch.cache.slots, batch.cache.length) == size
    assert batch.nbytes <= batch.nbytes_of(prefilled, *size)


def test_buckets_are_powers_of_two() -> None:
    assert [bucket(count) for count in (1, 2, 3, 4, 5, 8, 9, 128)] == [1, 2, 4, 4, 8, 8, 16, 128]


@pytest.mark.parametrize("wait", ["item", "tolist", "nonzero"])
def test_a_step_that_waits_cannot_be_captured(graphs: list[Graph], wait: str) -> None:
    assert not graphs
    steps = StepGraphs()
    x = torch.ones(1)

    def step() -> Tensor:
        getattr(x, wait)()
        return x

    assert steps.run("kind", step) is x
    with pytest.raises(CaptureError, match=r"\w+ waits for the device"):
        steps.run("kind", step)


def test_a_failed_capture_says_what_failed_and_restores_the_stream(
    graphs: list[Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def capture(*_: Any, **__: Any) -> Iterator[None]:
        try:
            yield
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    def fail() -> Tensor:
        raise ValueError("the step waits")

    streams: list[Any] = []
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    steps = StepGraphs()
    steps.run("kind", lambda: torch.ones(1))
    with pytest.raises(CaptureError, match=r"^the step waits$"):
        steps.run("kind", fail)
    assert len(streams) == 1
    assert len(graphs) == 1


def test_a_step_that_cannot_be_captured_names_the_flag(
    model: Any, graphs: list[Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    choose = Chooser.choose

    def waiting(self: Chooser, logits: Tensor, *args: Any) -> Tensor:
        assert logits.sum().item() != 0
        return choose(self, logits, *args)

    monkeypatch.setattr(Chooser, "choose", waiting)
    with pytest.raises(ConfigError, match=r"--cuda-graphs: a step of generation cannot be captured: \w+ waits"):
        list(generate_texts(model, Letters(), texts(), batch_size=1, cuda_graphs=True))
    assert len(graphs) == 1


def test_casts_of_weights_are_computed_in_each_replay(graphs: list[Graph]) -> None:
    """Autocast would otherwise keep them, and a graph go on reading those of weights that have changed."""
    weight = torch.ones(2, 2, requires_grad=True)
    x = torch.ones(1, 2)
    steps = StepGraphs()
    with torch.autocast("cpu"), torch.no_grad():
        for size in (1.0, 2.0, 3.0):
            weight.fill_(size)
            result = steps.run("kind", lambda: torch.nn.functional.linear(x, weight))
            assert result.tolist() == [[2 * size] * 2]
        assert torch.is_autocast_cache_enabled()
    assert len(graphs) == 1


@pytest.mark.gpu
def test_real_graphs_give_the_tokens_of_steps_without_them() -> None:
    """In float32: a cache of fixed size is divided into other parts, whose weights bfloat16 rounds otherwise."""
    model: Any = tiny_model(torch.float32).to("cuda")
    expected, actual = ([Generation(PROMPTS[0], 40, one) for one in SAMPLINGS[:4]] for _ in range(2))
    list(generate_texts(model, Letters(), expected, batch_size=4))
    list(generate_texts(model, Letters(), actual, batch_size=4, cuda_graphs=True))
    assert results(actual) == results(expected)

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hymba_tune.errors import CheckpointError
from hymba_tune.generate import ChunkedDecoder, Decoder, Generation, Sampling, generate_texts, write
from hymba_tune.generate.sampling import sampling_probabilities, sampling_rows
from tests.generate.letters import END, PROMPTS, Letters
from tests.simulated_device import counted, simulated_device, to_device
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model(torch.float64)


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """Greedy decoding without a cache: every step computes the whole sequence again."""
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) - len(prompt) < count and END not in ids[len(prompt) :]:
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_batched_generation_equals_generation_one_by_one(model: Any, batch_size: int) -> None:
    """Sequences have different lengths, and join and leave the batch at different times."""
    counts = [8, 3, 12, 20, 1]
    generations = [Generation(p, n, number=i) for i, (p, n) in enumerate(zip(PROMPTS, counts, strict=True))]
    done = list(generate_texts(model, Letters(), generations, batch_size=batch_size))
    assert sorted(one.number for one in done) == list(range(len(PROMPTS)))
    for one in done:
        assert one.ids == greedy(model, PROMPTS[one.number], counts[one.number])
        assert one.finish_reason == ("stop" if one.ids[-1] == END else "length")


def test_the_cache_shrinks_when_the_longest_sequence_is_finished(model: Any) -> None:
    decoder = Decoder(model, Letters())
    short, long = Generation(PROMPTS[1], 40), Generation(PROMPTS[2], 4)
    decoder.add([short, long])
    while long.finish_reason is None:
        decoder.step()
    columns = max(key.shape[2] for key in decoder._batch.cache.keys.values())  # type: ignore[union-attr]
    assert columns < len(PROMPTS[2])
    while decoder.active:
        decoder.step()
    assert short.ids == greedy(model, PROMPTS[1], 40)
    assert decoder._batch.cache is None


def test_a_sequence_can_be_dropped(model: Any) -> None:
    decoder = Decoder(model, Letters())
    generations = [Generation(prompt, 5) for prompt in PROMPTS[:3]]
    decoder.add(generations)
    decoder.drop(generations[1])
    while decoder.active:
        decoder.step()
    assert len(generations[1].ids) == 1
    assert [generations[i].ids for i in (0, 2)] == [greedy(model, PROMPTS[i], 5) for i in (0, 2)]


def test_generation_ends_at_a_stop_string_which_is_not_part_of_the_text(model: Any) -> None:
    tokenizer = Letters()
    whole = tokenizer.decode(greedy(model, PROMPTS[0], 8))
    generation = Generation(PROMPTS[0], 8, stop=("never", whole[2:4]))
    list(generate_texts(model, tokenizer, [generation], batch_size=1))
    assert generation.text(tokenizer) == whole[: whole.find(whole[2:4])]
    assert generation.finish_reason == "stop"
    assert len(generation.ids) <= 4


def test_seeded_samples_do_not_depend_on_the_rest_of_the_batch(model: Any) -> None:
    sampling = Sampling(temperature=1.5, top_p=0.95, seed=3)
    alone, batched, other_seed = (Generation(PROMPTS[0], 12, sampling) for _ in range(3))
    list(generate_texts(model, Letters(), [alone], batch_size=1))
    others = [Generation(p, 9, Sampling(2.0, seed=i)) for i, p in enumerate(PROMPTS[1:])]
    list(generate_texts(model, Letters(), [*others, batched], batch_size=8))
    other_seed.sampling = Sampling(temperature=1.5, top_p=0.95, seed=4)
    list(generate_texts(model, Letters(), [other_seed], batch_size=1))
    assert alone.ids == batched.ids
    assert alone.ids != other_seed.ids


def test_top_p_samples_from_the_likeliest_tokens_only(model: Any) -> None:
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([PROMPTS[0]])).logits[0, -1]
    probabilities, order = (logits / 4).softmax(-1).sort(descending=True)
    allowed = set(order[: int((probabilities.cumsum(0) < 0.5).sum()) + 1].tolist())
    generations = [Generation(PROMPTS[0], 1, Sampling(4.0, 0.5, seed)) for seed in range(40)]
    sampled = {one.ids[0] for one in generate_texts(model, Letters(), generations, batch_size=8)}
    assert sampled <= allowed
    assert len(sampled) > 1


@given(
    exponent=st.floats(-323, 2),
    top_p=st.sampled_from([1.0, 0.5, 1e-8, 1e-300, 5e-324]),
    scale=st.sampled_from([1e-3, 1.0, 80.0, 1e30]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
@settings(max_examples=200, deadline=None)
def test_any_temperature_and_top_p_give_probabilities(
    exponent: float, top_p: float, scale: float, dtype: torch.dtype, seed: int
) -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    logits = (logits * scale).clamp(-6e4, 6e4).to(dtype)
    sampling = Sampling(10.0**exponent or 5e-324, top_p)
    rows = sampling_rows([sampling]).to(torch.promote_types(dtype, torch.float32))
    probabilities, tokens = (x[0] for x in sampling_probabilities(logits[None], rows))
    assert probabilities.isfinite().all()
    assert (probabilities >= 0).all()
    assert probabilities[0] > 0
    assert logits[tokens[0]] == logits.max()
    if exponent < -20 or top_p < 1e-7:
        assert (logits[tokens[probabilities > 0]] == logits.max()).all()


def test_extreme_sampling_is_greedy_and_leaves_other_texts_alone(model: Any) -> None:
    samplings = [Sampling(1e-45), Sampling(1.0, 1e-300), Sampling(0.0)]
    generations = [Generation(PROMPTS[0], 6, sampling) for sampling in samplings]
    list(generate_texts(model.float(), Letters(), generations, batch_size=3))
    model.double()
    assert generations[0].ids == generations[1].ids == generations[2].ids


@pytest.mark.parametrize("temperature", [1e-45, 5e-324])
def test_a_chat_takes_any_temperature(model: Any, temperature: float) -> None:
    limits: dict[str, Any] = {"ends": [END], "max_new_tokens": 6}
    written = write(model.float(), PROMPTS[:1], temperature=temperature, **limits)
    assert written == write(model, PROMPTS[:1], temperature=0.0, **limits)
    model.double()


def test_an_error_of_one_text_ends_that_text_only(model: Any) -> None:
    class Failing(Letters):
        def decode(self, *_: Any, **__: Any) -> str:
            raise ValueError("no text")

    generations = [Generation(PROMPTS[0], 5), Generation(PROMPTS[1], 5, stop=("a",)), Generation(PROMPTS[2], 5)]
    decoder = Decoder(model, Failing())
    decoder.add(generations)
    while decoder.active:
        decoder.step()
    assert [one.finish_reason for one in generations].count("error") == 1
    assert str(generations[1].error) == "no text"
    assert [generations[i].ids for i in (0, 2)] == [greedy(model, PROMPTS[i], 5) for i in (0, 2)]


def test_a_prompt_that_does_not_fit_into_memory_fails_alone(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prefill = Decoder._prefill

    def limited(self: Decoder, generations: list[Generation]) -> Any:
        if max(len(one.prompt) for one in generations) > 20:
            raise torch.OutOfMemoryError("out of memory")
        return prefill(self, generations)

    monkeypatch.setattr(Decoder, "_prefill", limited)
    generations = [Generation(prompt, 5) for prompt in PROMPTS[:3]]
    decoder = Decoder(model, Letters())
    decoder.add(generations)
    while decoder.active:
        decoder.step()
    assert isinstance(generations[2].error, torch.OutOfMemoryError)
    assert [generations[i].ids for i in (0, 1)] == [greedy(model, PROMPTS[i], 5) for i in (0, 1)]
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        list(generate_texts(model, Letters(), [Generation(PROMPTS[2], 5)], batch_size=1))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error(
    model: Any, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    prefill = Decoder._prefill

    def broken(self: Decoder, generations: list[Generation]) -> Any:
        output = prefill(self, generations)
        output.logits[0] = float("nan")
        return output

    monkeypatch.setattr(Decoder, "_prefill", broken)
    generations = [Generation(prompt, 3, Sampling(temperature)) for prompt in PROMPTS[:2]]
    Decoder(model, Letters()).add(generations)
    assert generations[1].error is None
    with pytest.raises(CheckpointError, match="logits are NaN or infinite after 9 tokens"):
        list(generate_texts(model, Letters(), [Generation(PROMPTS[0], 3)], batch_size=1))


def test_log_probabilities_are_recorded(model: Any) -> None:
    generation = Generation(PROMPTS[0], 3, top=4)
    list(generate_texts(model, Letters(), [generation], batch_size=1))
    with torch.no_grad():
        logits = model(torch.tensor([PROMPTS[0] + generation.ids])).logits[0].log_softmax(-1)
    for place, score in enumerate(generation.scores, start=len(PROMPTS[0]) - 1):
        assert score.log_prob == pytest.approx(float(logits[place, score.token]), abs=1e-6)
        assert [token for token, _ in score.top] == logits[place].topk(4).indices.tolist()
        assert score.top[0] == (score.token, pytest.approx(score.log_prob))


@pytest.mark.parametrize("kind", [Decoder, ChunkedDecoder])
def test_a_step_waits_for_the_device_once(kind: type[Decoder]) -> None:
    """Whatever its texts want; also when one leaves."""
    wants = [{"top": 3}, {"sampling": Sampling(1.3, 0.9, 5, 20, 0.01)}, {"sampling": Sampling(repetition_penalty=1.2)}]
    generations = [Generation(prompt, 30, **want) for prompt, want in zip(PROMPTS, wants, strict=False)]
    with simulated_device(interpret=False):
        tokenizer: Any = Letters()
        decoder = kind(to_device(tiny_model()), tokenizer)
        decoder.add(generations)
        decoder.step()
        for step in range(3):
            with counted() as counts:
                decoder.step()
            assert counts.waits.total() == 1
            if step == 1:
                with counted() as counts:
                    decoder.drop(generations[0])
                assert not counts.waits


def test_dynamic_ntk_is_rejected() -> None:
    with pytest.raises(CheckpointError, match="rope_type dynamic_ntk rotates all keys again"):
        Decoder(tiny_model(rope_type="dynamic_ntk"), Letters())

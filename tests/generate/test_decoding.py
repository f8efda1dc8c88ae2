from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hymba_tune.errors import CheckpointError
from hymba_tune.generate import Decoder, Generation, Sampling, generate_texts
from tests.tiny import random_texts, tiny_model

PROMPTS = [text.tolist() for text in random_texts([9, 1, 30, 4, 12])]
END = 1


class Letters:
    """A tokenizer whose tokens are letters; decoding adds no space before a text."""

    eos_token_id = END

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(chr(ord("A") + i) for i in ids if i != END or not skip_special_tokens)


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
    columns = max(key.shape[2] for key in decoder._cache.keys.values())  # type: ignore[union-attr]
    assert columns < len(PROMPTS[2])
    while decoder.active:
        decoder.step()
    assert short.ids == greedy(model, PROMPTS[1], 40)
    assert decoder._cache is None


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


def test_log_probabilities_are_recorded(model: Any) -> None:
    generation = Generation(PROMPTS[0], 3, top=4)
    list(generate_texts(model, Letters(), [generation], batch_size=1))
    with torch.no_grad():
        logits = model(torch.tensor([PROMPTS[0] + generation.ids])).logits[0].log_softmax(-1)
    for place, score in enumerate(generation.scores, start=len(PROMPTS[0]) - 1):
        assert score.log_prob == pytest.approx(float(logits[place, score.token]), abs=1e-6)
        assert [token for token, _ in score.top] == logits[place].topk(4).indices.tolist()
        assert score.top[0] == (score.token, pytest.approx(score.log_prob))


def test_dynamic_ntk_is_rejected() -> None:
    with pytest.raises(CheckpointError, match="rope_type dynamic_ntk rotates all keys again"):
        Decoder(tiny_model(rope_type="dynamic_ntk"), Letters())

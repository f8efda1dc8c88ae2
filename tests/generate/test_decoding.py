from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hymba_tune.errors import CheckpointError
from hymba_tune.generate import Decoder, Sampling, Writing, write_texts
from tests.tiny import random_texts, tiny_model

PROMPTS = [text.tolist() for text in random_texts([9, 1, 30, 4, 12])]
END = 1


class Letters:
    """A tokenizer whose tokens are letters; it puts no space before a text."""

    eos_token_id = END

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(chr(ord("A") + i) for i in ids if i != END or not skip_special_tokens)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model(torch.float64)


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """Token by token, each time the whole text anew."""
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) - len(prompt) < count and END not in ids[len(prompt) :]:
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_texts_written_together_are_those_written_alone(model: Any, batch_size: int) -> None:
    """Of other lengths, joining and leaving at other times."""
    counts = [8, 3, 12, 20, 1]
    texts = [Writing(p, n, number=i) for i, (p, n) in enumerate(zip(PROMPTS, counts, strict=True))]
    done = list(write_texts(model, Letters(), texts, batch_size=batch_size))
    assert sorted(text.number for text in done) == list(range(len(PROMPTS)))
    for text in done:
        assert text.ids == greedy(model, PROMPTS[text.number], counts[text.number])
        assert text.ended == ("stop" if text.ids[-1] == END else "length")


def test_a_long_text_that_left_is_forgotten(model: Any) -> None:
    decoder = Decoder(model, Letters())
    short, long = Writing(PROMPTS[1], 40), Writing(PROMPTS[2], 4)
    decoder.add([short, long])
    while long.ended is None:
        decoder.step()
    columns = max(key.shape[2] for key in decoder._cache.keys.values())  # type: ignore[union-attr]
    assert columns < len(PROMPTS[2])
    while decoder.texts:
        decoder.step()
    assert short.ids == greedy(model, PROMPTS[1], 40)
    assert decoder._cache is None


def test_a_text_can_be_dropped(model: Any) -> None:
    decoder = Decoder(model, Letters())
    texts = [Writing(prompt, 5) for prompt in PROMPTS[:3]]
    decoder.add(texts)
    decoder.drop(texts[1])
    while decoder.texts:
        decoder.step()
    assert len(texts[1].ids) == 1
    assert [texts[i].ids for i in (0, 2)] == [greedy(model, PROMPTS[i], 5) for i in (0, 2)]


def test_ends_at_a_stop_string_and_does_not_show_it(model: Any) -> None:
    tokenizer = Letters()
    whole = tokenizer.decode(greedy(model, PROMPTS[0], 8))
    text = Writing(PROMPTS[0], 8, stop=("never", whole[2:4]))
    list(write_texts(model, tokenizer, [text], batch_size=1))
    assert text.text(tokenizer) == whole[: whole.find(whole[2:4])]
    assert text.ended == "stop"
    assert len(text.ids) <= 4


def test_a_seed_draws_the_same_whatever_is_written_beside(model: Any) -> None:
    sampling = Sampling(temperature=1.5, top_p=0.95, seed=3)
    alone, beside, other = (Writing(PROMPTS[0], 12, sampling) for _ in range(3))
    list(write_texts(model, Letters(), [alone], batch_size=1))
    crowd = [Writing(p, 9, Sampling(2.0, seed=i)) for i, p in enumerate(PROMPTS[1:])]
    list(write_texts(model, Letters(), [*crowd, beside], batch_size=8))
    other.sampling = Sampling(temperature=1.5, top_p=0.95, seed=4)
    list(write_texts(model, Letters(), [other], batch_size=1))
    assert alone.ids == beside.ids
    assert alone.ids != other.ids


def test_top_p_takes_from_the_likeliest_only(model: Any) -> None:
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([PROMPTS[0]])).logits[0, -1]
    probabilities, order = (logits / 4).softmax(-1).sort(descending=True)
    allowed = set(order[: int((probabilities.cumsum(0) < 0.5).sum()) + 1].tolist())
    texts = [Writing(PROMPTS[0], 1, Sampling(4.0, 0.5, seed)) for seed in range(40)]
    drawn = {text.ids[0] for text in write_texts(model, Letters(), texts, batch_size=8)}
    assert drawn <= allowed
    assert len(drawn) > 1


def test_notes_log_probabilities(model: Any) -> None:
    text = Writing(PROMPTS[0], 3, top=4)
    list(write_texts(model, Letters(), [text], batch_size=1))
    with torch.no_grad():
        logits = model(torch.tensor([PROMPTS[0] + text.ids])).logits[0].log_softmax(-1)
    for place, score in enumerate(text.scores, start=len(PROMPTS[0]) - 1):
        assert score.log_prob == pytest.approx(float(logits[place, score.token]), abs=1e-6)
        assert [token for token, _ in score.top] == logits[place].topk(4).indices.tolist()
        assert score.top[0] == (score.token, pytest.approx(score.log_prob))


def test_needs_a_model_that_a_cache_fits() -> None:
    with pytest.raises(CheckpointError, match="rope_type dynamic_ntk turns all keys anew"):
        Decoder(tiny_model(rope_type="dynamic_ntk"), Letters())

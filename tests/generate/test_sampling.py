"""Penalties, biases and the tokens that are sampled from, against their definitions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor, TopKLogitsWarper

from hymba_tune.generate import Generation, Sampling, generate_texts
from hymba_tune.generate.sampling import penalized_logits, sampling_probabilities, sampling_rows
from tests.tiny import random_texts, tiny_model

LOGITS = torch.randn(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
PROMPT, IDS = [3, 4, 4], [5, 5, 6, 4]


class NoText:
    """A tokenizer of texts that do not matter."""

    eos_token_id = -1

    def decode(self, *_: Any, **__: Any) -> str:
        return ""


def penalized(sampling: Sampling) -> Tensor:
    """Return the changed logits of one text."""
    vocabulary = len(LOGITS)
    in_prompt = torch.isin(torch.arange(vocabulary), torch.tensor(PROMPT))
    counts = torch.tensor(IDS).bincount(minlength=vocabulary)
    bias = torch.tensor([sampling.logit_bias.get(token, 0.0) for token in range(vocabulary)])
    return penalized_logits(LOGITS[None], sampling_rows([sampling]), in_prompt[None], counts[None], bias[None])[0]


def test_penalties_follow_their_definitions() -> None:
    sampling = Sampling(repetition_penalty=1.7, presence_penalty=0.5, frequency_penalty=0.25, logit_bias={7: -9.0})
    changed = penalized(sampling)
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([[*PROMPT, *IDS]]), LOGITS[None].clone())[0]
    for token in range(len(LOGITS)):
        count = IDS.count(token)
        expected[token] -= 0.5 * (count > 0) + 0.25 * count + 9.0 * (token == 7)
    torch.testing.assert_close(changed, expected)
    assert LOGITS.equal(penalized(Sampling()))


@given(top_k=st.integers(0, 25), min_p=st.floats(0, 1), temperature=st.floats(0.1, 5))
@settings(max_examples=60, deadline=None)
def test_top_k_and_min_p_leave_out_what_transformers_leaves_out(top_k: int, min_p: float, temperature: float) -> None:
    scores = (LOGITS / temperature)[None]
    scores = TopKLogitsWarper(top_k)(None, scores) if top_k else scores
    scores = MinPLogitsWarper(min_p)(None, scores)
    rows = sampling_rows([Sampling(temperature, top_k=top_k, min_p=min_p)])
    probabilities, tokens = (x[0] for x in sampling_probabilities(LOGITS[None], rows))
    kept = probabilities > 0
    torch.testing.assert_close(probabilities[kept], scores.softmax(-1)[0][tokens[kept]])
    assert probabilities.sum() == pytest.approx(1)


def test_greedy_decoding_obeys_penalties_and_biases() -> None:
    model = tiny_model()
    prompt = random_texts([9])[0].tolist()
    plain, biased, banned = (
        Generation(prompt, 4, sampling)
        for sampling in (Sampling(), Sampling(logit_bias={11: 1e3}), Sampling(frequency_penalty=1e6))
    )
    list(generate_texts(model, NoText(), [plain, biased, banned], batch_size=3))
    assert biased.ids == [11] * 4
    assert len(set(banned.ids)) == 4
    assert plain.ids[0] == banned.ids[0] != 11


def test_a_stop_token_ends_the_text_and_is_not_part_of_it() -> None:
    class Numbers(NoText):
        def decode(self, ids: list[int], **_: Any) -> str:
            return " ".join(map(str, ids))

    model = tiny_model()
    prompt = random_texts([9])[0].tolist()
    whole, cut = Generation(prompt, 6), Generation(prompt, 6)
    list(generate_texts(model, Numbers(), [whole], batch_size=1))
    cut.stop_ids = frozenset({whole.ids[2]})
    list(generate_texts(model, Numbers(), [cut], batch_size=1))
    end = whole.ids.index(whole.ids[2])
    assert cut.finish_reason == "stop"
    assert cut.ids == whole.ids[: end + 1]
    assert cut.text(Numbers()) == Numbers().decode(whole.ids[:end])

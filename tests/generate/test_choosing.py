"""Tokens chosen for a batch on its device are those that each text would choose alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hymba_tune.generate import Generation, Sampling, TokenScore, token_score
from hymba_tune.generate.choosing import Chooser

VOCABULARY = 61
SAMPLINGS = [
    Sampling(),
    Sampling(repetition_penalty=1.6, logit_bias={3: 2.5, 7: -50.0}),
    Sampling(1.0, seed=4),
    Sampling(1.3, top_p=0.8, seed=5, top_k=12, min_p=0.05),
    Sampling(0.7, top_p=0.6, seed=6, presence_penalty=0.7, frequency_penalty=0.4),
    Sampling(2.0, seed=7, min_p=0.2, repetition_penalty=0.8),
    Sampling(1e-45, seed=8),
]


def alone(generation: Generation, logits: Tensor, generator: torch.Generator) -> int:
    """Choose the next token of one text from its logits ``(V,)``, by the definitions."""
    sampling, wanted = generation.sampling, logits.clone()
    for token in {*generation.prompt, *generation.ids}:
        penalty = sampling.repetition_penalty
        wanted[token] = wanted[token] / penalty if wanted[token] > 0 else wanted[token] * penalty
    for token in set(generation.ids):
        count = generation.ids.count(token)
        wanted[token] -= torch.tensor(sampling.frequency_penalty).to(wanted) * count + sampling.presence_penalty
    for token, bias in sampling.logit_bias.items():
        wanted[token] += bias
    if sampling.temperature == 0:
        return int(wanted.argmax())

    scaled = (wanted - wanted.max()) / max(sampling.temperature, torch.finfo(wanted.dtype).tiny)
    probabilities, tokens = scaled.softmax(-1).sort(descending=True)
    if sampling.top_k or sampling.min_p:
        probabilities[probabilities < sampling.min_p * probabilities[0]] = 0
        probabilities[sampling.top_k or VOCABULARY :] = 0
        probabilities = probabilities / probabilities.sum()
    outside = probabilities.cumsum(-1) - probabilities >= sampling.top_p
    return int(tokens[torch.multinomial(probabilities.masked_fill(outside, 0), 1, generator=generator)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_text_gets_the_tokens_that_it_would_choose_alone(dtype: torch.dtype) -> None:
    """Texts join in two groups, and one leaves at every third step, with the last one in its row."""
    noise = torch.Generator().manual_seed(0)
    texts = [Generation([3, 5, 5, row + 9], 9, one, top=row % 3 or None) for row, one in enumerate(SAMPLINGS)]
    generators = {one: torch.Generator().manual_seed(one.sampling.seed or 0) for one in texts}
    chooser, batch = Chooser(), list[Generation]()
    for step in range(12):
        new = {0: texts[:4], 2: texts[4:]}.get(step, [])
        logits = torch.randn(len(batch) + len(new), VOCABULARY, generator=noise, dtype=dtype) * 3
        if new:
            chooser.join(new, logits, len(batch) + len(new))
        batch += new
        needs = chooser.prepare(batch)
        choices = chooser.read(chooser.choose(logits, needs), batch, needs)
        assert chooser.last(len(batch)).flatten().tolist() == [choice.token for choice in choices]
        for one, row, choice in zip(batch, logits, choices, strict=True):
            assert choice.token == alone(one, row, generators[one])
            one.ids.append(choice.token)
            if one.top is not None:
                assert choice.score == token_score(row.log_softmax(-1), choice.token, one.top)
        if step % 3 == 2:
            rows = [0, len(batch) - 1, *range(2, len(batch) - 1)]
            batch = [batch[row] for row in rows]
            chooser.keep(rows)


def test_texts_without_scores_have_none() -> None:
    scored, plain = Generation([1], 1, top=0), Generation([1], 1)
    logits = torch.zeros(2, VOCABULARY)
    chooser = Chooser()
    chooser.join([scored, plain], logits, 2)
    needs = chooser.prepare([scored, plain])
    assert needs.top == 0
    first, _ = chooser.read(chooser.choose(logits, needs), [scored, plain], needs)
    assert first.score == TokenScore(0, pytest.approx(-torch.tensor(VOCABULARY).log().item()))


def test_logits_that_are_not_finite_are_said() -> None:
    texts = [Generation([1], 1), Generation([1], 1), Generation([1], 1)]
    logits = torch.zeros(3, VOCABULARY)
    logits[0, 5], logits[1, 6] = float("nan"), float("inf")
    chooser = Chooser()
    chooser.join(texts, logits, 4)
    needs = chooser.prepare(texts)
    assert [choice.is_finite for choice in chooser.read(chooser.choose(logits, needs), texts, needs)] == [
        False,
        False,
        True,
    ]

"""Scores of tokens and their gradients equal those computed from all logits at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hymba_tune.model import log_probs
from hymba_tune.model.log_probs import score_tokens
from tests.tiny import random_texts, tiny_model


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Compute the log-probabilities from all logits at once."""
    logits = (hidden[:, :-1] @ weight.T).log_softmax(-1)
    is_scored = labels[:, 1:] != -100
    return logits.gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0] * is_scored


def inputs(rows: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states, the weight of a head, and labels, some of which are -100."""
    hidden, weight = torch.randn(rows, length, 6, dtype=torch.float64), torch.randn(11, 6, dtype=torch.float64)
    labels = torch.randint(11, (rows, length))
    labels[torch.rand(rows, length) < 0.4] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), labels


@pytest.mark.parametrize(("rows", "length"), [(1, 2), (3, 7), (2, 65)])
def test_log_probs_and_gradients_are_those_of_the_whole_logits(
    rows: int, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_probs, "CHUNK", 5)
    hidden, weight, labels = inputs(rows, length)
    weights = torch.randn(rows, length - 1, dtype=torch.float64)
    scores, expected = score_tokens(hidden, weight, labels).log_probs, plain(hidden, weight, labels)
    assert scores is not None
    torch.testing.assert_close(scores, expected)
    gradients = torch.autograd.grad((scores * weights).sum(), [hidden, weight])
    torch.testing.assert_close(gradients, torch.autograd.grad((expected * weights).sum(), [hidden, weight]))


def test_gradcheck() -> None:
    hidden, weight, labels = inputs(2, 4)
    assert torch.autograd.gradcheck(lambda h, w: score_tokens(h, w, labels).log_probs, (hidden, weight))


def test_other_scores_are_those_of_the_whole_logits() -> None:
    hidden, weight, labels = inputs(3, 9)
    scores = score_tokens(hidden, weight, labels)
    is_scored = labels[:, 1:] != -100
    logits = hidden[:, :-1] @ weight.T
    assert scores.entropy is not None
    assert scores.mean_logits is not None
    assert scores.is_top1 is not None
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(scores.entropy, entropy * is_scored)
    torch.testing.assert_close(scores.mean_logits, logits.mean(-1) * is_scored)
    assert torch.equal(scores.is_top1, (logits.argmax(-1) == labels[:, 1:]) & is_scored)


def test_model_scores_do_not_depend_on_padding() -> None:
    model = tiny_model()
    text, other = random_texts([9, 6])
    ids = torch.stack([text, torch.cat([other, other.new_zeros(3)])])
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    scores = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True).log_probs
    for row, alone in enumerate((text, other)):
        logits = model(input_ids=alone[None]).logits[0, :-1].log_softmax(-1)
        expected = logits.gather(1, alone[1:, None])[:, 0]
        torch.testing.assert_close(scores[row, : len(alone) - 1], expected, atol=2e-5, rtol=0)
    assert not scores[1, 5:].any()

"""A newly initialized model trains in every precision and with checkpointed activations."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus
from transformers.utils import logging as transformers_logging

from hymba_tune.model import HymbaConfig, HymbaForCausalLM, layers
from hymba_tune.model.cache import CACHE_NAME
from tests.tiny import CONFIG, gradients, random_texts, tiny_model
from tests.tolerances import BFLOAT16_MODEL, FLOAT64

IDS = torch.stack(random_texts([16, 16]))


def fresh_model(**overrides: Any) -> HymbaForCausalLM:
    return HymbaForCausalLM(HymbaConfig(**CONFIG | overrides))


@pytest.mark.parametrize(
    "overrides",
    [{}, {"kq_norm": "rms", "mlp_hidden_act": "relu2"}, {"tie_word_embeddings": False, "num_memory_tokens": 0}],
    ids=["as_released", "normed_heads_and_relu2", "untied_without_meta_tokens"],
)
def test_fresh_model_learns_a_text(overrides: dict[str, Any]) -> None:
    model = fresh_model(**overrides)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(50):
        loss = model(IDS[:1], labels=IDS[:1]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(torch.tensor(CONFIG["vocab_size"]).log().item(), abs=0.3)
    assert losses[-1] < 0.2


def test_fresh_models_of_one_seed_are_the_same() -> None:
    torch.manual_seed(5)
    model = fresh_model()
    torch.manual_seed(5)
    again = fresh_model()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_initial_time_steps_are_between_a_thousandth_and_a_tenth() -> None:
    for layer in fresh_model(hidden_size=240).model.layers:
        steps = softplus(layer.mamba.dt_proj[0].bias.detach())
        assert 0.001 <= steps.min() < 0.0015
        assert 0.07 < steps.max() <= 0.1


def test_initial_decay_rates_are_whole_numbers() -> None:
    for layer in fresh_model().model.layers:
        assert torch.allclose(layer.mamba.A_log[0].exp(), torch.tensor([1.0, 2.0, 3.0]).expand(48, 3))
        assert (layer.mamba.D[0] == 1).all()


def gradients_of_a_padded_batch(model: HymbaForCausalLM) -> dict[str, Tensor | None]:
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    model.zero_grad()
    model(IDS, labels=IDS, attention_mask=mask).loss.backward()
    return gradients(model)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not_reentrant"])
@pytest.mark.parametrize("rope_type", ["ntk", "dynamic_ntk"])
def test_checkpointed_activations_change_no_gradient(rope_type: str, use_reentrant: bool) -> None:
    model = tiny_model(torch.float64, rope_type=rope_type).train()
    calls: list[Tensor] = []
    model.model.layers[2].mamba.register_forward_pre_hook(lambda _, inputs: calls.append(inputs[0]))
    expected = gradients_of_a_padded_batch(model)
    once = len(calls)
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    FLOAT64.check_all(gradients_of_a_padded_batch(model), expected)
    assert len(calls) == once + 2 * once  # the backward computed the layer again


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not_reentrant"])
def test_checkpointed_activations_of_a_frozen_model_give_gradients_to_trained_parameters(use_reentrant: bool) -> None:
    model = tiny_model(torch.float64).train().requires_grad_(False)
    for layer in model.model.layers:
        layer.mamba.in_proj.weight.requires_grad_()
    expected = gradients_of_a_padded_batch(model)
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    FLOAT64.check_all(gradients_of_a_padded_batch(model), expected)


def test_checkpointed_activations_do_not_change_generation() -> None:
    model = tiny_model(tie_word_embeddings=False)
    expected = model.generate(IDS, max_new_tokens=5, do_sample=False)
    model.train().activation_checkpointing_enable({"use_reentrant": False})
    assert torch.equal(model.generate(IDS, max_new_tokens=5, do_sample=False), expected)


@pytest.mark.parametrize("backbone", [False, True], ids=["whole", "backbone"])
def test_use_cache_with_checkpointed_activations_is_warned_of_once_and_ignored(
    backbone: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers_logging.warning_once.cache_clear()
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    whole = tiny_model().train()
    whole.activation_checkpointing_enable()
    model = whole.model if backbone else whole
    expected = model(IDS)
    for _ in range(2):
        output = model(IDS, use_cache=True)
        assert getattr(output, CACHE_NAME) is None
        assert torch.equal(output[0], expected[0])
    assert [message for message in caplog.messages if "gradient checkpointing" in message] == [
        "use_cache=True has no effect under gradient checkpointing; no cache is returned"
    ]


def test_texts_of_a_cache_are_not_continued_with_checkpointed_activations() -> None:
    model = tiny_model().train()
    cache = getattr(model(IDS, use_cache=True), CACHE_NAME)
    model.activation_checkpointing_enable()
    with pytest.raises(ValueError, match="in the backward, which cannot continue the texts of a cache; pass whole"):
        model(IDS[:, :1], **{CACHE_NAME: cache})


def test_bfloat16_is_close_to_float32() -> None:
    expected = tiny_model()(IDS, labels=IDS)
    actual = tiny_model(torch.bfloat16)(IDS, labels=IDS)
    assert actual.logits.dtype == actual.loss.dtype == torch.float32
    BFLOAT16_MODEL.check(actual.logits, expected.logits)
    BFLOAT16_MODEL.check(actual.loss, expected.loss)


@pytest.mark.parametrize("kq_norm", ["none", "rms", "perhead-rms"])
def test_autocast_is_close_to_float32(kq_norm: str) -> None:
    model = tiny_model(kq_norm=kq_norm)
    expected = model(IDS, labels=IDS)
    with torch.autocast("cpu", torch.bfloat16):
        actual = model(IDS, labels=IDS)
    actual.loss.backward()
    BFLOAT16_MODEL.check(actual.logits, expected.logits)
    assert {x.dtype for x in gradients(model).values() if x is not None} == {torch.float32}


def test_decays_and_skips_of_a_bfloat16_model_are_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(torch.bfloat16)
    calls: list[tuple[Tensor, ...]] = []
    scan = layers.packed_scan

    def spy(*args: Any) -> Any:
        calls.append(args)
        return scan(*args)

    monkeypatch.setattr(layers, "packed_scan", spy)
    model(IDS)
    for layer, (_, dt, A, *_) in zip(model.model.layers, calls, strict=True):
        assert dt.dtype == torch.float32
        assert torch.equal(A, -torch.exp(layer.mamba.A_log[0].float()))


def test_layers_are_not_split_over_devices() -> None:
    model = tiny_model()
    assert list(model._no_split_modules) == [type(model.model.layers[0]).__name__]


def test_texts_longer_than_the_context_get_one_warning(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    ids = torch.zeros(1, 65, dtype=torch.long) + 5
    transformers_logging.warning_once.cache_clear()  # another test may have caused the same warning
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level(logging.WARNING, logger="transformers"), torch.no_grad():
        model(ids[:, :64])
        assert not caplog.messages
        cache = model(ids[:, :60], use_cache=True)[CACHE_NAME]
        for token in ids[:, 60:].unbind(1):
            model(token[:, None], cache=cache)
        model(ids)
    assert caplog.messages == ["a text is longer than max_position_embeddings, 64 tokens"]

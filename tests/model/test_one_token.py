"""The pass of one new token of each text equals the pass of any number of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from hymba_tune.model import HymbaCache, HymbaForCausalLM, use_kernels
from hymba_tune.model.layers import HymbaMixer
from tests.tiny import random_texts, tiny_model
from tests.tolerances import BFLOAT16_MODEL, FLOAT32, Tolerance

PROMPTS = random_texts([7, 1, 12])
STEPS = random_texts([9, 9, 9])
"""The new tokens of each text; windowed buffers wrap around and the others grow."""

PLAIN_KERNELS = {"prepare": "separate", "attend": "torch", "update": "separate"}

MODELS: dict[str, dict[str, Any]] = {
    "as_released": {},
    "rms_norm_of_heads": {"kq_norm": "rms"},
    "perhead_rms_norm_of_heads": {"kq_norm": "perhead-rms"},
    "plain_rope": {"rope_type": None},
    "no_rope": {"rope": False},
    "relu2": {"mlp_hidden_act": "relu2"},
    "biases": {"mamba_proj_bias": True},
    "no_conv_bias": {"mamba_conv_bias": False},
    "no_inner_layernorms": {"mamba_inner_layernorms": False},
    "normed_heads_of_consumers": {"kv_reuse_group": [[0, 1, 2]], "kq_norm": "perhead-rms"},
    "global_consumer_of_windowed_producer": {"kv_reuse_group": [[2, 3]]},
    "one_key_value_head": {"num_key_value_heads": 1},
    "expand_3": {"mamba_expand": 3},
    "no_meta_tokens": {"num_memory_tokens": 0},
    "no_window": {"sliding_window": None},
    "window_of_one": {"sliding_window": 1},
    "d_conv_1": {"mamba_d_conv": 1},
    "d_conv_7": {"mamba_d_conv": 7},
}


def decoded(model: HymbaForCausalLM) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the logits of every step ``(S, steps, V)``, and what the cache holds after them."""
    ids = pad_sequence(PROMPTS, batch_first=True)
    mask = pad_sequence([torch.ones_like(text) for text in PROMPTS], batch_first=True)
    cache = HymbaCache(model.config)
    with torch.no_grad():
        model(ids, attention_mask=mask, cache=cache)
        logits = [model(tokens[:, None], cache=cache).logits for tokens in torch.stack(STEPS, 1)]
    held = {
        f"{name} {layer}": tensor
        for name in ("keys", "values", "tails", "states")
        for layer, tensor in getattr(cache, name).items()
    }
    return torch.cat(logits, 1), held


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the layer of each pass of one token."""
    recorded: list[int] = []
    one_token = HymbaMixer._one_token

    def recording(mixer: HymbaMixer, *arguments: Any) -> Any:
        recorded.append(mixer.layer)
        return one_token(mixer, *arguments)

    monkeypatch.setattr(HymbaMixer, "_one_token", recording)
    return recorded


def in_other_pass(model: HymbaForCausalLM) -> tuple[Tensor, dict[str, Tensor]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HymbaMixer, "_continues_by_one_token", lambda *_: False)
        return decoded(model)


@pytest.fixture
def kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    """Choose these backends of the pass of one token, or the fastest."""
    before = use_kernels(**request.param)
    yield
    use_kernels(**before)


# Native operations round less often than others; each of them has its own test in bfloat16.
@pytest.mark.parametrize(
    ("dtype", "close", "kernels"),
    [(torch.float32, FLOAT32, {}), (torch.bfloat16, BFLOAT16_MODEL, PLAIN_KERNELS)],
    ids=["float32", "bfloat16"],
    indirect=["kernels"],
)
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("overrides", MODELS.values(), ids=MODELS.keys())
def test_it_equals_the_pass_of_any_number_of_tokens(
    overrides: dict[str, Any], dtype: torch.dtype, close: Tolerance, calls: list[int]
) -> None:
    model = tiny_model(dtype, **overrides)
    expected, expected_cache = in_other_pass(model)
    assert not calls

    logits, cache = decoded(model)
    assert calls == [0, 1, 2, 3] * len(STEPS[0])
    close.check(logits, expected, "logits")
    close.check_all(cache, expected_cache)


def _hooked(module: nn.Module) -> None:
    module.register_forward_pre_hook(lambda *_: None)


def _observed(module: nn.Module) -> None:
    module.register_forward_hook(lambda *_: None)


def _replaced_forward(module: nn.Module) -> None:
    forward = module.forward
    module.forward = lambda *arguments, **options: forward(*arguments, **options)  # type: ignore[method-assign]


def _other_class(module: nn.Module) -> None:
    module.__class__ = type("Adapted", (type(module),), {})


@pytest.mark.parametrize("change", [_hooked, _observed, _replaced_forward, _other_class])
@pytest.mark.parametrize("name", ["conv1d", "dt_proj.0", "A_log", "D", "B_layernorm", "self_attn.q_norm"])
def test_a_layer_whose_small_modules_are_not_plain_calls_them(
    name: str, change: Callable[[nn.Module], None], calls: list[int]
) -> None:
    model = tiny_model(torch.float32, kq_norm="rms")
    expected, _ = decoded(model)
    calls.clear()

    change(model.model.layers[1].mamba.get_submodule(name))
    logits, _ = decoded(model)
    assert calls == [0, 2, 3] * len(STEPS[0])
    FLOAT32.check(logits, expected)


@pytest.mark.parametrize("name", ["gate_proj", "up_proj", "down_proj"])
def test_a_projection_of_the_mlp_that_a_hook_observes_is_called(name: str) -> None:
    model = tiny_model()
    seen = []
    mlp = model.model.layers[1].moe.experts[0]
    mlp.get_submodule(name).register_forward_hook(lambda *arguments: seen.append(arguments))
    decoded(model)
    assert len(seen) == 1 + len(STEPS[0])
    with torch.no_grad():
        mlp(torch.ones(2, 24), torch.ones(2, 24))
    assert len(seen) == 2 + len(STEPS[0])


def test_a_residual_stream_is_added_in_place() -> None:
    mlp = tiny_model().model.layers[1].moe
    x, residual = torch.randn(2, 3, 24)
    with torch.no_grad():
        expected = residual + mlp(x)
        added = mlp(x, residual)
    assert added is residual
    FLOAT32.check(added, expected)

    with_gradients = mlp(x, residual)
    assert with_gradients is not residual
    FLOAT32.check(residual, expected)


def test_gradients_through_a_step_take_the_other_pass(calls: list[int]) -> None:
    model = tiny_model()
    cache = HymbaCache(model.config)
    model(STEPS[0][None], cache=cache)
    model(STEPS[1][None, :1], cache=cache).logits.sum().backward()
    assert not calls

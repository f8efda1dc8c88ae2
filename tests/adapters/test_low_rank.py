"""LoRA's update in fewer operations computes what PEFT computes, and leaves all but one plain adapter to PEFT."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from torch import Tensor, nn

from hymba_tune.adapters.low_rank import LowRankLinear, use_fewer_operations
from tests.simulated_device import counted, simulated_device, to_device

NAME = "default"


def adapted(dtype: torch.dtype = torch.float64, **changes: Any) -> tuple[nn.Module, LowRankLinear]:
    """A linear layer with an adapter that changes it, and the adapted layer itself."""
    model = get_peft_model(
        nn.Sequential(nn.Linear(6, 5, dtype=dtype)), LoraConfig(r=2, lora_alpha=6, target_modules=["0"], **changes)
    )
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter)
    use_fewer_operations(model)
    layer = model.base_model.model[0]
    assert isinstance(layer, LowRankLinear)
    return model, layer


def results(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """The output for an input, and all gradients."""
    x = x.clone().requires_grad_()
    torch.manual_seed(1)
    output = layer(x)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    leaves = [x, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
    return [output.detach(), *torch.autograd.grad((output * weights).sum(), leaves)]


def results_of_peft(layer: nn.Module, x: Tensor) -> list[Tensor]:
    layer.__class__ = Linear
    try:
        return results(layer, x)
    finally:
        layer.__class__ = LowRankLinear


@pytest.mark.parametrize("shape", [(7, 6), (2, 3, 6), (6,)])
@pytest.mark.parametrize("changes", [{}, {"lora_dropout": 0.5}, {"use_rslora": True}])
def test_it_computes_what_peft_computes(shape: tuple[int, ...], changes: dict[str, Any]) -> None:
    _, layer = adapted(**changes)
    x = torch.randn(shape, dtype=torch.float64)
    for actual, expected in zip(results(layer, x), results_of_peft(layer, x), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("autocast", [True, False])
def test_the_base_decides_the_dtype(*, autocast: bool) -> None:
    _, layer = adapted(torch.bfloat16)
    for factor in (layer.lora_A[NAME], layer.lora_B[NAME]):
        factor.float()
    x = torch.randn(7, 6, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        actual, expected = results(layer, x), results_of_peft(layer, x)
    assert [one.dtype for one in actual] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0.03, atol=0.1)


def hooked(model: Any) -> None:
    model.base_model.model[0].lora_A[NAME].register_forward_pre_hook(lambda *_: None)


CHANGES: dict[str, Callable[[Any], None]] = {
    "disabled": lambda model: model.base_model.disable_adapter_layers(),
    "merged": lambda model: model.base_model.merge_adapter(),
    "a second adapter": lambda model: (
        model.add_adapter("other", LoraConfig(r=3, target_modules=["0"], init_lora_weights=False)),
        model.base_model.set_adapter([NAME, "other"]),
    ),
    "a hook that moves a factor": hooked,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_all_else_is_left_to_peft(change: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch) -> None:
    model, layer = adapted(bias="none")
    change(model)
    x = torch.randn(7, 6, dtype=torch.float64)
    monkeypatch.setattr("hymba_tune.adapters.low_rank._LowRankUpdate", None)
    actual = layer(x)
    layer.__class__ = Linear
    assert torch.equal(actual, layer(x))


def test_without_gradients_peft_computes() -> None:
    """A saved adapter gives the same logits, bit for bit, where PEFT alone loads it."""
    _, layer = adapted(torch.float32)
    x = torch.randn(7, 6)
    with torch.no_grad():
        actual = layer(x)
        layer.__class__ = Linear
        assert torch.equal(actual, layer(x))


@pytest.mark.parametrize("changes", [{"use_dora": True}, {"lora_bias": True}])
def test_other_adapters_are_left_to_peft(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    _, layer = adapted(torch.float32, **changes)
    monkeypatch.setattr("hymba_tune.adapters.low_rank._LowRankUpdate", None)
    assert layer(torch.randn(7, 6)).shape == (7, 5)


def test_a_step_of_one_layer_takes_thirteen_launches() -> None:
    model, layer = adapted(torch.bfloat16)
    for factor in (layer.lora_A[NAME], layer.lora_B[NAME]):
        factor.float()
    to_device(model)
    with simulated_device() as device:
        x = torch.randn(7, 6, dtype=torch.bfloat16, device=device).requires_grad_()
        with counted() as counts, torch.autocast("simulated", torch.bfloat16):
            output = layer(x)
            torch.autograd.grad(output, [x, *(p for p in layer.parameters() if p.requires_grad)], output.detach())
    assert counts.launches.total() <= 13
    assert not counts.waits

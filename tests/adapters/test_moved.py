import pytest
import torch
from torch import Tensor

from hymba_tune.adapters import AdapterWatch
from hymba_tune.config import MetaTokens
from hymba_tune.model.layers import HymbaMixer, HymbaMLP
from tests.adapters.small import METHODS, adapted_model, train


@pytest.mark.parametrize("meta", MetaTokens)
@pytest.mark.parametrize("method", METHODS)
def test_one_step_changes_every_adapted_module(method: str, meta: str) -> None:
    model = adapted_model("all", meta, torch.bfloat16, **METHODS[method])
    watch = AdapterWatch(model)
    train(model, steps=1)
    assert watch.unmoved() == []


def test_without_a_step_every_module_is_reported() -> None:
    watch = AdapterWatch(adapted_model("mlp", "full"))
    mlp = [f"model.layers.{i}.moe.experts.0.{name}_proj" for i in range(4) for name in ("gate", "up", "down")]
    assert watch.unmoved() == ["model.memory_tokens", *mlp]


def test_module_that_is_read_instead_of_called_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: HymbaMLP, x: Tensor) -> Tensor:
        gate = torch.nn.functional.linear(x, self.gate_proj.weight)
        return self.down_proj(torch.nn.functional.silu(gate) * self.up_proj(x))

    monkeypatch.setattr(HymbaMLP, "forward", forward)
    model = adapted_model()
    watch = AdapterWatch(model)
    train(model)
    assert watch.unmoved() == [f"model.layers.{i}.moe.experts.0.gate_proj" for i in range(4)]


def test_module_with_an_unused_output_is_reported_despite_weight_decay(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: HymbaMixer, hidden: Tensor, *states: object) -> tuple[object, ...]:
        return self.in_proj(hidden)[:, : hidden.shape[1]] * 0, *states[:2]

    monkeypatch.setattr(HymbaMixer, "forward", forward)
    model = adapted_model("attention", "frozen")
    watch = AdapterWatch(model)
    train(model)
    assert f"model.layers.{0}.mamba.in_proj" in watch.unmoved()


def test_adapter_that_is_trained_further_is_seen_to_change() -> None:
    model = adapted_model()
    train(model)
    watch = AdapterWatch(model)
    train(model, steps=1)
    assert watch.unmoved() == []

"""The learning rate of each parameter, and the schedules."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from transformers import get_scheduler
from transformers.training_args import OptimizerNames

from hymba_tune.config import Method, TrainingOptions
from hymba_tune.train.optimizers import (
    OPTIMIZERS,
    Rates,
    describe_groups,
    optimizer_name,
    parameter_groups,
    schedule,
)
from tests.adapters.small import adapted_model
from tests.tiny import tiny_model

BASE = "base_model.model.model."
INSIDE_SSM = ("A_log.0", "D.0", "conv1d.weight", "conv1d.bias", "x_proj.0.weight", "dt_proj.0.weight", "dt_proj.0.bias")
INSIDE_SSM += tuple(f"{name}_layernorm.weight" for name in ("dt", "B", "C"))


def members(model: torch.nn.Module, rates: Rates) -> dict[str, set[str]]:
    """The names of the parameters of each group."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, rates, weight_decay=0.1, decayed=names.values())
    parameters = {group["name"]: {names[id(p)] for p in group["params"]} for group in groups}
    assert sum(len(group["params"]) for group in groups) == len(set().union(*parameters.values()))
    assert set().union(*parameters.values()) == {name for name, p in model.named_parameters() if p.requires_grad}
    return parameters


def test_without_separate_rates_all_parameters_are_one_group() -> None:
    assert members(adapted_model(), Rates(1.0)).keys() == {"all others"}


def test_groups_of_an_adapter_are_exact() -> None:
    model = adapted_model()
    groups = members(model, Rates(1.0, meta=2.0, ssm=3.0, loraplus=16.0))
    layer = f"{BASE}layers.0."
    first = {name: {n.removeprefix(layer) for n in group if n.startswith(layer)} for name, group in groups.items()}
    inside = ("x_proj.0", "dt_proj.0")
    others = ("mamba.in_proj", "mamba.out_proj", *(f"moe.experts.0.{name}_proj" for name in ("gate", "up", "down")))
    assert first == {
        "all others": {f"{name}.lora_A.default.weight" for name in others},
        "B": {f"{name}.lora_B.default.weight" for name in others},
        "ssm": {f"mamba.{name}.lora_A.default.weight" for name in inside},
        "ssm B": {f"mamba.{name}.lora_B.default.weight" for name in inside},
        "meta tokens": set(),
    }
    assert groups["meta tokens"] == {f"{BASE}memory_tokens.lora_embedding_{factor}.default" for factor in "AB"}
    rates = {g["name"]: g["lr"] for g in parameter_groups(model, Rates(1, 2, 3, 16), weight_decay=0, decayed=[])}
    assert rates == {
        "all others, no decay": 1,
        "B, no decay": 16,
        "ssm, no decay": 3,
        "ssm B, no decay": 48,
        "meta tokens, no decay": 2,
    }


def test_fully_trained_meta_tokens_have_their_rate() -> None:
    groups = members(adapted_model(meta="full"), Rates(1.0, meta=2.0))
    assert groups["meta tokens"] == {f"{BASE}memory_tokens.modules_to_save.default.weight"}


def test_magnitudes_of_dora_keep_the_rate_of_a() -> None:
    groups = members(adapted_model(method=Method.dora), Rates(1.0, loraplus=4.0))
    assert all(".lora_B." in name for name in groups["B"])
    assert any("lora_magnitude_vector" in name for name in groups["all others"])


def test_groups_of_full_training_are_exact() -> None:
    groups = members(tiny_model(), Rates(1.0, meta=2.0, ssm=3.0, loraplus=16.0))
    assert groups.keys() == {"all others", "ssm", "meta tokens"}  # there are no LoRA matrices
    assert groups["meta tokens"] == {"model.memory_tokens.weight"}
    assert groups["ssm"] == {f"model.layers.{layer}.mamba.{name}" for layer in range(4) for name in INSIDE_SSM}


def test_weight_decay_applies_to_the_named_parameters() -> None:
    model = tiny_model()
    groups = parameter_groups(model, Rates(1.0, ssm=2.0), weight_decay=0.1, decayed=["model.embed_tokens.weight"])
    assert [(group["name"], group["weight_decay"]) for group in groups] == [
        ("all others", 0.1),
        ("all others, no decay", 0.0),
        ("ssm, no decay", 0.0),
    ]
    assert [p.shape for p in groups[0]["params"]] == [model.model.embed_tokens.weight.shape]
    assert describe_groups(groups)[0] == {
        "name": "all others",
        "parameters": model.model.embed_tokens.weight.numel(),
        "lr": 1.0,
        "weight_decay": 0.1,
    }


def test_every_optimizer_of_the_settings_is_one_of_transformers() -> None:
    assert OPTIMIZERS.keys() == set(get_args(TrainingOptions.model_fields["optimizer"].annotation))
    assert set(OPTIMIZERS.values()) <= {name.value for name in OptimizerNames}


def rates_of(name: str, steps: int = 100, **changes: Any) -> list[float]:
    settings = {"warmup": 0.1, "decay": 0.2, "floor": 0.0} | changes
    kind, arguments = schedule(name, steps=steps, **settings)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(kind, optimizer, round(settings["warmup"] * steps), steps, arguments)
    rates = []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("name", get_args(TrainingOptions.model_fields["lr_schedule"].annotation))
def test_every_schedule_warms_up_to_its_peak(name: str) -> None:
    rates = rates_of(name)
    assert rates[:11] == pytest.approx([step / 10 for step in range(11)])
    assert max(rates) == 1.0


def test_schedules_fall_as_documented() -> None:
    assert set(rates_of("constant")[10:]) == {1.0}
    assert rates_of("linear")[55] == pytest.approx(0.5)
    assert rates_of("cosine")[55] == pytest.approx(0.5)
    assert rates_of("cosine", floor=0.1)[55] == pytest.approx(0.55)
    assert rates_of("inverse-sqrt")[40] == pytest.approx(0.5)
    stable = rates_of("wsd", floor=0.1)
    assert set(stable[10:81]) == {1.0}
    assert stable[85] == pytest.approx(0.1 + 0.9 * 0.5)
    assert 0.1 < stable[99] < 0.15


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_short_runs_have_a_schedule_too(steps: int) -> None:
    assert len(rates_of("wsd", steps=steps, decay=1.0)) == steps


def test_adamw_is_fused_on_a_gpu() -> None:
    assert optimizer_name("adamw", "cuda") == OptimizerNames.ADAMW_TORCH_FUSED.value
    assert optimizer_name("adamw", "cpu") == OptimizerNames.ADAMW_TORCH.value
    assert optimizer_name("adamw8bit", "cuda") == OPTIMIZERS["adamw8bit"]

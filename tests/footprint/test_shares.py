from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from hymba_tune.config import SFTConfig
from hymba_tune.distributed.strategies import LIVE_PARAMETERS, REDUCE_BUCKET
from hymba_tune.footprint import Batch, Footprint, Sharding, StepMemory
from hymba_tune.footprint.shares import ModelWeights, Weights, held_by_each
from tests.tiny import tiny_model

FULL = ModelWeights([Weights(0, 4000, 1000, 1000)] * 3, Weights(0, 8000, 2000, 2000))
"""A model of 5,000 parameters in float32 that are all trained."""
HALF = ModelWeights([Weights(0, 2000, 1000, 1000)] * 3, Weights(0, 4000, 2000, 2000))
"""The same in bfloat16, as DeepSpeed's formulas have it."""
ADAPTED = ModelWeights([Weights(2000, 400, 100, 1100)] * 3, Weights(4000, 0, 0, 2000))
"""A model of 5,000 frozen parameters in bfloat16 with an adapter of 300 in float32."""
ADAM: dict[str, Any] = {"moment_bytes": 8, "accumulates": False}


def test_ddp_holds_everything_and_buckets_as_large_as_the_gradients() -> None:
    alone = held_by_each(FULL, Sharding(), **ADAM)
    held = held_by_each(FULL, Sharding(8), **ADAM)
    assert (held.trained, held.optimizer, held.gathered, held.stepping) == (20_000, 40_000, 0, 20_000)
    assert held == replace(alone, buckets=20_000)
    assert held_by_each(ADAPTED, Sharding(8), **ADAM).buckets == 1200


def test_fsdp_shares_everything_and_gathers_two_layers() -> None:
    held = held_by_each(FULL, Sharding(8, "fsdp"), **ADAM)
    assert (held.trained, held.optimizer, held.stepping) == (2500, 5000, 2500)
    assert held.gathered == 8000 + 2 * 4000  # the embedding, two layers
    assert held.buckets == 8000  # the embedding, the largest unit
    assert held_by_each(ADAPTED, Sharding(8, "fsdp"), **ADAM).frozen == 10_000 / 8


def test_fsdp_keeps_whole_gradients_between_the_batches_of_a_step() -> None:
    held = held_by_each(FULL, Sharding(8, "fsdp"), **ADAM | {"accumulates": True})
    assert held.waiting == 20_000
    assert held_by_each(FULL, Sharding(8, "zero2"), **ADAM | {"accumulates": True}).waiting == 20_000 / 8


@pytest.mark.parametrize("processes", [1, 8, 64])
def test_zero2_is_deepspeeds_formula(processes: int) -> None:
    """2 bytes a parameter, and 18 of them shared."""
    zero = pytest.importorskip("deepspeed.runtime.zero.stage_1_and_2")
    _, expected = zero.estimate_zero2_model_states_mem_needs(5000, processes, 1, cpu_offload=False)
    held = held_by_each(HALF, Sharding(processes, "zero2"), **ADAM)
    assert held.trained + held.optimizer + held.stepping == pytest.approx(expected, abs=3)
    _, expected = zero.estimate_zero2_model_states_mem_needs(5000, processes, 1, cpu_offload=True)
    held = held_by_each(HALF, Sharding(processes, "zero2", "optimizer"), **ADAM)
    assert held.trained + held.optimizer + held.stepping == expected


@pytest.mark.parametrize("offload", [None, "optimizer", "parameters"])
def test_zero3_is_deepspeeds_formula(offload: str | None) -> None:
    """18 bytes a parameter, shared, and 2 that it leaves out: the gradients in 16 bits, which are kept with the others.

    Gathered layers are counted apart.
    """
    zero = pytest.importorskip("deepspeed.runtime.zero.stage3")
    settings = {"cpu_offload": offload is not None, "cpu_offload_params": offload == "parameters"}
    cpu, expected, largest = zero.estimate_zero3_model_states_mem_needs(
        5000, 0, 8, 1, **settings, additional_buffer_factor=1
    )
    held = held_by_each(HALF, Sharding(8, "zero3", offload), **ADAM)
    assert largest == 0
    gradients = 2 * 5000
    kept = 0 if offload else gradients / 8
    assert held.trained + held.optimizer + held.stepping == pytest.approx(expected + kept, abs=3)
    assert 8 * held.offloaded == pytest.approx(cpu + gradients if offload else 0, abs=24)


def test_zero3_keeps_gathered_weights_up_to_its_limit() -> None:
    assert held_by_each(FULL, Sharding(8, "zero3"), **ADAM).gathered == 20_000
    large = ModelWeights([Weights(2**33, 0, 0, 2**32)] * 2, Weights(0, 4, 1, 1))
    assert held_by_each(large, Sharding(8, "zero3"), **ADAM).gathered == pytest.approx(2 * LIVE_PARAMETERS)


@pytest.mark.parametrize(("strategy", "buckets"), [("zero2", 2), ("zero3", 1)])
def test_zero_reserves_its_buckets_whatever_is_trained(strategy: str, buckets: int) -> None:
    assert held_by_each(ADAPTED, Sharding(8, strategy), **ADAM).buckets == buckets * 4 * REDUCE_BUCKET


def test_offloaded_parameters_of_fsdp_leave_gathered_layers_and_unreduced_gradients() -> None:
    held = held_by_each(FULL, Sharding(8, "fsdp", "parameters"), **ADAM | {"accumulates": True})
    assert (held.trained, held.optimizer, held.stepping) == (0, 0, 0)
    assert (held.gathered, held.waiting) == (16_000, 20_000)
    assert held.offloaded == 2500 + 5000 + 2500


@cache
def memory() -> StepMemory:
    model = tiny_model(hidden_size=96, intermediate_size=256, vocab_size=512, num_hidden_layers=5)
    return StepMemory(model, dtype=torch.float32, own_kernels=True)


def step(strategy: str, processes: int = 8, offload: str | None = None) -> Footprint:
    settings: dict[str, Any] = {"checkpointing": True, "accumulates": False, "optimizer": "adamw"}
    return memory().of(Batch.full(2, 64), **settings, sharding=Sharding(processes, strategy, offload))


def test_parts_of_a_step_are_shares() -> None:
    alone, ddp, fsdp, zero2 = step("ddp", 1), step("ddp"), step("fsdp"), step("zero2")
    assert (ddp.weights, ddp.optimizer, ddp.gradients) == (alone.weights, alone.optimizer, alone.gradients)
    assert ddp.buckets == alone.weights
    assert fsdp.weights == pytest.approx(alone.weights / 8, rel=1e-3)
    assert fsdp.optimizer == pytest.approx(alone.optimizer / 8, rel=1e-3)
    assert fsdp.gradients < alone.gradients
    assert (zero2.weights, zero2.gathered) == (alone.weights, 0)
    for sharded in (ddp, fsdp, zero2):
        assert sharded.head == alone.head or sharded.activations == alone.activations  # of a process's own batch


def test_more_processes_need_less_of_each_with_shares_and_not_with_ddp() -> None:
    for strategy in ("fsdp", "zero2", "zero3"):
        assert step(strategy, 16).total < step(strategy, 2).total
    assert step("ddp", 16).total == step("ddp", 2).total


def test_what_is_offloaded_is_not_in_the_total() -> None:
    kept, offloaded = step("zero3"), step("zero3", offload="optimizer")
    assert offloaded.optimizer == 0
    assert offloaded.offloaded > kept.optimizer
    assert offloaded.total < kept.total


def test_processes_are_those_that_were_started(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SFTConfig(nproc="4", nnodes=2, rendezvous="a:1", strategy="zero3", offload="parameters")
    assert Sharding.of(config) == Sharding(8, "zero3", "parameters")
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert Sharding.of(config).processes == 6

from __future__ import annotations

import pytest

from hymba_tune.footprint.shares import ModelWeights, Sharding, Weights
from hymba_tune.footprint.traffic import ALL_GATHER, ALL_REDUCE, Collective, Network, bytes_sent, step_traffic

FULL = ModelWeights([Weights(0, 4000, 1000, 1000)] * 3, Weights(0, 8000, 2000, 2000))
"""A model of 5,000 parameters in float32 that are all trained."""
FROZEN = ModelWeights([Weights(2000, 400, 100, 1100)] * 3, Weights(4000, 0, 0, 2000))
"""A model of 5,000 frozen parameters in bfloat16 with an adapter of 300 in float32."""
LINKS = Network(inside=1e9, between=1e8, devices=8)


def sent(model: ModelWeights, strategy: str, processes: int = 4, batches: int = 1) -> float:
    return bytes_sent(step_traffic(model, Sharding(processes, strategy), batches=batches), processes)


def test_one_process_sends_nothing() -> None:
    assert sent(FULL, "ddp", 1) == 0


def test_zero_paper_section_7() -> None:
    """Data parallelism sends twice the parameters; with divided weights it is three times."""
    psi = 4 * 5000 * 3 / 4
    assert sent(FULL, "ddp") == 2 * psi
    assert sent(FULL, "zero3") == 3 * psi
    assert sent(FULL, "zero2") == 3 * psi  # DeepSpeed's all-reduce; the paper's reduce-scatter makes it 2


def test_fsdp_gathers_layers_twice_and_the_rest_once() -> None:
    assert sent(FULL, "fsdp") == (2 * 12_000 + 8000 + 20_000) * 3 / 4


def test_adapters_cost_ddp_little_and_divided_weights_everything() -> None:
    assert sent(FROZEN, "ddp") == 2 * 1200 * 3 / 4
    assert sent(FROZEN, "fsdp") > 5 * sent(FROZEN, "ddp")


@pytest.mark.parametrize(("strategy", "grows"), [("ddp", False), ("fsdp", True), ("zero2", True), ("zero3", True)])
def test_batches_of_a_step(strategy: str, grows: bool) -> None:
    once, often = (sent(FULL, strategy, batches=batches) for batches in (1, 4))
    assert (once < often <= 4 * once) if grows else once == often


def test_a_machine_is_bound_by_its_links_and_several_by_their_ports() -> None:
    large = Collective(ALL_REDUCE, 10**12, 1)
    assert LINKS.seconds(large, 8) == pytest.approx(2 * 7 / 8 * 10**12 / 1e9, rel=1e-6)
    assert LINKS.seconds(large, 16) == pytest.approx(2 * 15 / 16 * 10**12 / 1e8, rel=1e-6)


def test_small_operations_take_a_hop_for_each_process() -> None:
    seconds = [LINKS.seconds(Collective(ALL_GATHER, 0, 10), processes) for processes in (2, 8, 64, 512)]
    assert seconds == sorted(seconds)
    assert seconds[1] == pytest.approx(10 * (8.4e-6 + 7 * 3.4e-6))
    assert seconds[2] == pytest.approx(10 * (8.4e-6 + 56 * 3.4e-6 + 7 * 14e-6))


def test_a_tree_starts_sooner_among_many() -> None:
    assert LINKS.seconds(Collective(ALL_REDUCE, 0, 1), 512) == pytest.approx(8.4e-6 + 2 * (7 * 4e-6 + 6 * 14e-6))

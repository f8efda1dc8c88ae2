"""The models and caches of the GPU benchmark."""

from __future__ import annotations

import pytest
import torch

from hymba_tune.model.cache import CACHE_NAME
from tests.conftest import ROOT


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its modules are found, as when it runs."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@torch.no_grad()
def test_a_cache_of_fixed_size_generates_the_same_tokens() -> None:
    from gpu_decode import Generation, fixed_cache, hymba_cache
    from gpu_models import hymba

    model = hymba(torch.device("cpu"), quick=True).float().eval()
    ids = []
    for make, more in ((hymba_cache, {}), (fixed_cache, {"room": 20})):
        torch.manual_seed(0)
        generation = Generation(model, make(model, 20, 2, **more), 2)
        generation()
        ids.append(generation.ids)
    assert ids[0].equal(ids[1])


@torch.no_grad()
def test_llamas_preallocated_cache_gives_the_same_logits() -> None:
    from gpu_decode import STEPS, Generation, copying_cache, roomy_cache
    from gpu_models import llama

    model = llama(torch.device("cpu"), quick=True).float().eval()
    logits = []
    for make, more in ((copying_cache, {}), (roomy_cache, {"room": STEPS + 1})):
        torch.manual_seed(0)
        cache = make(model, 7, 3, **more)
        generation = Generation(model, cache, 3)
        generation()
        assert cache.get_seq_length() == 7 + STEPS
        logits.append(model(input_ids=generation.ids, **{CACHE_NAME: cache}, use_cache=True).logits)
    torch.testing.assert_close(*logits, rtol=0, atol=0)


def test_the_released_shape_is_measured() -> None:
    from gpu_models import RELEASED
    from gpu_step import matmul_weights

    from hymba_tune.model import HymbaConfig, HymbaForCausalLM

    with torch.device("meta"):
        model = HymbaForCausalLM(HymbaConfig(**RELEASED))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters == 1_522_797_824
    # All parameters except meta tokens, norms, convolutions, biases and decays are in linear layers.
    assert 0.99 < matmul_weights(model) / parameters < 1

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hymba_tune.config import ChatConfig, EvalConfig, GenerationOptions, ServeConfig
from hymba_tune.errors import ConfigError
from hymba_tune.generate import find_model, opening


def test_the_caches_of_compiled_kernels_are_limited(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a limit, memory grows with every new number of tokens. The user's own limit stays."""
    first, second = opening.KERNEL_CACHES
    monkeypatch.delenv(first, raising=False)
    monkeypatch.setenv(second, "7")
    find_model(str(small_model), ChatConfig(dtype="float32")).load()
    assert os.environ[first] == opening.CACHED_KERNELS
    assert os.environ[second] == "7"


@pytest.mark.parametrize("config", [ChatConfig, EvalConfig, ServeConfig])
def test_cuda_graphs_need_a_gpu(config: type[GenerationOptions]) -> None:
    """Which is said before the model is looked for."""
    with pytest.raises(ConfigError, match="--cuda-graphs replays steps on a GPU, and the model is on cpu"):
        find_model("no/such-model", config(cuda_graphs=True, device="cpu"))

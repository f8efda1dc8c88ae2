from __future__ import annotations

from typing import Any

import pytest
import torch

from hymba_tune.adapters import add_adapter, lora_config
from hymba_tune.config import MetaTokens, Method
from hymba_tune.footprint import Batch, Footprint, StepMemory
from hymba_tune.footprint.shapes import LiveBytes
from hymba_tune.model import use_kernels
from tests.tiny import tiny_model

SHAPE: dict[str, Any] = {"hidden_size": 96, "intermediate_size": 256, "vocab_size": 512, "num_hidden_layers": 5}
TEXTS, LENGTH = 3, 128


def adapted(dtype: torch.dtype) -> Any:
    model = tiny_model(dtype, **SHAPE)
    choices: dict[str, Any] = {"rank": 4, "alpha": None, "dropout": 0.0, "rslora": False}
    config = lora_config(model, targets=["all"], method=Method.lora, meta_tokens=MetaTokens.lora, **choices)
    return add_adapter(model, config, ["all"])


def estimated(model: Any, dtype: torch.dtype, *, checkpointing: bool) -> Footprint:
    memory = StepMemory(model, dtype=dtype, own_kernels=True)
    return memory.of(Batch.full(TEXTS, LENGTH), checkpointing=checkpointing, accumulates=False, optimizer="sgd")


def counted(model: Any, dtype: torch.dtype, *, checkpointing: bool) -> int:
    """Bytes in addition to the weights at the peak of a real step."""
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    ids = torch.randint(3, 512, (TEXTS, LENGTH))
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype is not torch.float32)
    with LiveBytes() as memory:
        with autocast:
            loss = model(input_ids=ids, labels=ids, use_cache=False, skip_logits=True).loss
        loss.backward()
    return memory.peak


@pytest.mark.parametrize(
    ("dtype", "method", "checkpointing"),
    [
        (torch.float32, "full", False),
        (torch.float32, "lora", True),
        (torch.bfloat16, "full", True),
        (torch.bfloat16, "lora", False),
    ],
)
def test_estimate_is_that_of_a_real_step(dtype: torch.dtype, method: str, checkpointing: bool) -> None:
    model = adapted(dtype) if method == "lora" else tiny_model(**SHAPE)
    step = estimated(model, dtype, checkpointing=checkpointing)
    expected = step.total - step.weights - step.adapter - step.optimizer
    assert counted(model, dtype, checkpointing=checkpointing) == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize(("operation", "backend"), [("scan", "torch"), ("attention", "sdpa")])
def test_any_way_to_compute_is_counted(operation: str, backend: str) -> None:
    before = use_kernels(**{operation: backend})
    try:
        model = tiny_model(**SHAPE)
        step = estimated(model, torch.float32, checkpointing=False)
        expected = step.total - step.weights - step.optimizer
        assert counted(model, torch.float32, checkpointing=False) == pytest.approx(expected, rel=0.25)
    finally:
        use_kernels(**before)


def test_parts_follow_the_settings() -> None:
    model = tiny_model(**SHAPE)
    memory = StepMemory(model, dtype=torch.float32, own_kernels=True)
    size = sum(parameter.nbytes for parameter in model.parameters())
    batch = Batch.full(TEXTS, LENGTH)
    usual: dict[str, Any] = {"checkpointing": True, "accumulates": True, "optimizer": "adamw"}
    step = memory.of(batch, **usual)
    assert (step.weights, step.optimizer, step.adapter) == (size, 2 * size, 0)
    assert step.gradients == size
    assert memory.of(batch, **usual | {"optimizer": "adamw8bit"}).optimizer < step.optimizer / 3
    assert memory.of(batch, **usual | {"checkpointing": False}).activations > step.activations
    assert memory.of(Batch.full(1, LENGTH), **usual).activations < step.activations


def test_padding_takes_little_and_longer_texts_more() -> None:
    memory = StepMemory(tiny_model(**SHAPE, sliding_window=64), dtype=torch.float32, own_kernels=False)
    batches = [Batch(256, 128, 256, 256), Batch(256, 128, 256, 512), Batch(256, 256, 256, 256)]
    plain, padded, longer = (
        memory.of(batch, checkpointing=True, accumulates=False, optimizer="sgd").total for batch in batches
    )
    assert plain < padded < 1.3 * plain
    assert longer >= plain

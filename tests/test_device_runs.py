"""What the kit does on a GPU, on the simulated device: nothing mixes devices, and launches and waits have budgets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from hymba_tune.adapters import add_adapter
from hymba_tune.config import Method
from hymba_tune.generate import Decoder, Generation, Sampling
from hymba_tune.model.attention import ATTENTION
from hymba_tune.model.backends import OPERATIONS
from hymba_tune.serve.worker import Job, Worker
from hymba_tune.train.guard import LossGuard
from tests.adapters.small import config_for
from tests.generate.letters import END, PROMPTS, Letters
from tests.runs import run, settings
from tests.simulated_device import (
    DEVICE,
    Counts,
    as_one_launch,
    counted,
    in_own_thread,
    simulated_device,
    to_device,
    to_host,
)
from tests.tiny import random_texts, tiny_model

WAITS_OF_A_FORWARD = 2
"""For the layout of the texts, and for the number of tokens with a loss."""
WAITS_OF_A_STEP = 4
LAUNCHES_OF_A_LAYER = 160
"""Of a LoRA step, forward and backward."""
FEW_LAYERS: dict[str, Any] = {"num_hidden_layers": 2, "global_attn_idx": [0], "kv_reuse_group": [[0, 1]]}
LAYOUTS: dict[str, dict[str, Any]] = {
    "a row": {},
    "packed": {"position_ids": torch.arange(6).repeat(4)[None]},
    "padded": {"attention_mask": (torch.arange(12) < torch.tensor([12, 5])[:, None]).long()},
    "checkpointed": {},
}


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every operation by plain torch, whose values do not depend on the device."""
    for operation in OPERATIONS.values():
        monkeypatch.setattr(operation, "chosen", operation._plain.name)


class OneKernel(torch.autograd.Function):
    """Attention as FlexAttention launches it: one kernel forward, and two backward. It returns zeros."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(query, key, value)
        with as_one_launch("flex"):
            return query.new_zeros(query.shape[0], query.shape[1] * value.shape[2])

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, ...]:
        with as_one_launch("flex, dQ"):
            pass
        with as_one_launch("flex, dK and dV"):
            return tuple(torch.zeros_like(x) for x in ctx.saved_tensors)


@pytest.fixture
def device() -> Iterator[torch.device]:
    """The device, whose Triton kernels are counted and not computed, with a stand-in for a compiled kernel."""
    with simulated_device(interpret=False) as device:
        blocks = ATTENTION.backends["blocks"]
        stand_in = replace(blocks, name="flex", run=lambda query, key, value, *_: OneKernel.apply(query, key, value))
        with patch.object(ATTENTION, "backends", {"flex": stand_in, "blocks": blocks}):
            yield device


def trained(method: Method, **changes: Any) -> nn.Module:
    model: Any = tiny_model(torch.bfloat16, **changes)
    if method is not Method.full:
        model = add_adapter(model, config_for(model, method=method), ["all"])
    return to_device(model.train())


def step(model: nn.Module, layout: dict[str, Any]) -> Counts:
    """A forward and backward in autocast, as in a run."""
    shape = (1, 24) if "attention_mask" not in layout else (2, 12)
    ids = torch.randint(3, 61, shape).to(DEVICE)
    inputs = {name: tensor.to(DEVICE) for name, tensor in layout.items()}
    items = torch.tensor(23.0, device=DEVICE)
    with counted() as counts:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            output = model(input_ids=ids, labels=ids, skip_logits=True, num_items_in_batch=items, **inputs)
        output.loss.backward()
    assert to_host(output.loss).isfinite()
    return counts


@pytest.mark.parametrize("method", Method)
def test_training_waits_for_its_texts_only(method: Method, device: torch.device) -> None:  # noqa: ARG001
    model: Any = trained(method)
    for name, layout in LAYOUTS.items():
        if name == "checkpointed":
            model.activation_checkpointing_enable()
        counts = step(model, layout)
        assert counts.waits.total() <= WAITS_OF_A_FORWARD, (name, counts.waits)


def test_a_lora_step_takes_few_launches_a_layer(device: torch.device) -> None:  # noqa: ARG001
    launches = []
    for layers in (2, 4):
        pairs = [[layer, layer + 1] for layer in range(0, layers, 2)]
        model = trained(Method.lora, num_hidden_layers=layers, global_attn_idx=[], kv_reuse_group=pairs)
        launches.append(step(model, {}).launches)
    a_layer = Counter({name: count / 2 for name, count in (launches[1] - launches[0]).items()})
    assert a_layer.total() <= LAUNCHES_OF_A_LAYER, a_layer.most_common()


def test_a_step_of_a_run_waits_at_most_four_times(
    small_model: Path, questions: Path, tmp_path: Path, device: torch.device
) -> None:
    config = settings(
        small_model, questions, tmp_path / "out", steps=3, dtype="bfloat16", log_every=9, eval_split=0, save_every=9
    )
    waits: list[Counter[tuple[str, str]]] = []
    begin = LossGuard.on_step_begin

    def on_step_begin(guard: LossGuard, *args: Any, **kwargs: Any) -> None:
        waits.append(counts.waits.copy())
        begin(guard, *args, **kwargs)

    with (
        counted() as counts,
        patch.object(LossGuard, "on_step_begin", on_step_begin),
        patch("hymba_tune.train.flow.answer_samples"),
        patch("hymba_tune.train.setup.choose_device", lambda _: device),
        patch("hymba_tune.train.callbacks._has_gradient", lambda _: False),  # asked until a first gradient comes
        patch("transformers.training_args.is_torch_bf16_gpu_available", lambda: True),
    ):
        run(config)
    a_step = waits[-1] - waits[-2]
    assert 0 < a_step.total() <= WAITS_OF_A_STEP, a_step


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generate_writes_what_it_writes_on_a_cpu(settings: dict[str, Any]) -> None:
    model = tiny_model(**FEW_LAYERS)
    ids = torch.stack(random_texts([9, 9]))
    mask = (torch.arange(9) >= torch.tensor([0, 4])[:, None]).long()
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": END, "pad_token_id": 0, **settings}
    expected = model.generate(input_ids=ids, attention_mask=mask, **settings)
    with simulated_device():
        to_device(model)
        actual = model.generate(input_ids=ids.to(DEVICE), attention_mask=mask.to(DEVICE), **settings)
    assert torch.equal(to_host(actual), expected)


def generations() -> list[Generation]:
    wants: list[dict[str, Any]] = [{"top": 2}, {"sampling": Sampling(0.8, 0.9, seed=1)}, {}]
    return [Generation(prompt, 5, **want) for prompt, want in zip(PROMPTS, wants, strict=False)]


@pytest.mark.usefixtures("plain")
def test_the_decoder_and_the_server_write_what_they_write_on_a_cpu() -> None:
    model, tokenizer = tiny_model(**FEW_LAYERS), Letters()
    expected, decoded, served = generations(), generations(), generations()
    decoder = Decoder(model, tokenizer)
    decoder.add(expected)
    while decoder.active:
        decoder.step()

    with simulated_device(), patch.object(Worker, "_run", in_own_thread(Worker._run)):
        decoder = Decoder(to_device(model), tokenizer)
        decoder.add(decoded[:1])
        decoder.step()
        decoder.add(decoded[1:])
        while decoder.active:
            decoder.step()

        changes: SimpleQueue[None] = SimpleQueue()
        worker = Worker(model, tokenizer, batch_size=2, queue=8, chunk=2, prefix_bytes=10_000)
        job = Job(served, lambda: changes.put(None))
        worker.submit(job)
        while not job.done:
            changes.get(timeout=60)
        worker.stop()
        worker.join()

    assert job.error is None
    assert [one.error for one in decoded + served] == [None] * 6
    ids = [one.ids for one in expected]
    assert [one.ids for one in decoded] == ids
    assert [one.ids for one in served] == ids

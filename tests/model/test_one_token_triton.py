"""The Triton kernels of one new token of each text against their twins, interpreted without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hymba_tune.model import (
    HymbaCache,
    HymbaForCausalLM,
    attention_token_triton,
    one_token_triton,
    use_kernels,
)
from hymba_tune.model.backends import Operation, Task
from hymba_tune.model.few_rows import GATE_UP, _separate_gate_up
from hymba_tune.model.one_token import PREPARE, UPDATE, _separate_prepare, _separate_update
from hymba_tune.model.one_token_inputs import StateInputs, TokenInputs
from hymba_tune.model.one_token_triton import triton_gate_up, triton_prepare, triton_update
from hymba_tune.model.triton_kernels import triton_unavailable_reason
from tests.model.triton_launches import launches
from tests.simulated_device import DEVICE as SIMULATED
from tests.simulated_device import counted, simulated_device, to_device, to_host
from tests.tiny import random_texts, tiny_model
from tests.tolerances import BFLOAT16, BFLOAT16_MODEL, FLOAT32, Tolerance

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TEXTS, HEADS, GROUPS, WIDTH, VALUE_WIDTH, CHANNELS, COLUMNS = 3, 4, 2, 6, 10, 12, 5
RANK, STATES = 5, 3
LENGTHS = [0, 3, 8]
"""A text without a token yet, one with free columns, and one whose new token overwrites an old one."""
LAUNCHES_OF_A_LAYER = 12
"""Two norms, a mean of norms, five matrix products (gate and up as one), `prepare`, `update`, two of attention."""
CLOSE = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16}
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use blocks so small that a few heads and channels need several; skip if Triton is not installed."""
    if reason := triton_unavailable_reason():
        pytest.skip(reason)
    for name, size in {"BLOCK": 8, "CHANNELS": 8, "PROGRAMS": 2}.items():
        monkeypatch.setattr(one_token_triton, name, size)


def token_inputs(
    dtype: torch.dtype,
    *,
    without: tuple[str, ...] = (),
    per_head: bool = False,
    taps: int = 4,
    weights: torch.dtype | None = None,
) -> TokenInputs:
    """Return inputs of `prepare`, with strided rows, buffers and tails."""
    groups = 0 if "key" in without else GROUPS
    columns = HEADS * WIDTH + groups * (WIDTH + VALUE_WIDTH) + 2 * CHANNELS
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    narrow = weights or dtype
    tensors: dict[str, Any] = {
        "projected": random(TEXTS, columns + 3)[:, :columns],
        "q_norm": random(*[HEADS] * per_head, WIDTH, dtype=narrow),
        "k_norm": random(*[GROUPS] * per_head, WIDTH, dtype=narrow),
        "tables": (random(TEXTS, 1, WIDTH), random(TEXTS, 1, WIDTH)),
        "key": random(TEXTS, GROUPS, COLUMNS + 2, WIDTH)[:, :, :COLUMNS],
        "value": random(TEXTS, GROUPS, COLUMNS + 1, VALUE_WIDTH)[:, :, :COLUMNS],
        "conv_weight": random(CHANNELS, taps, dtype=narrow),
        "conv_bias": random(CHANNELS, dtype=narrow),
        "tails": random(TEXTS, taps, CHANNELS)[:, 1:],
    }
    tensors |= dict.fromkeys(without)
    lengths = torch.tensor(LENGTHS, device=DEVICE)
    return TokenInputs(**tensors, head_dim=WIDTH, eps=1e-3, lengths=lengths)


def state_inputs(dtype: torch.dtype, *, texts: int = TEXTS, without: tuple[str, ...] = ()) -> StateInputs:
    """Return inputs of `update`, with a gate of strided rows."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    tensors: dict[str, Any] = {
        "dt_norm": random(RANK),
        "B_norm": random(STATES),
        "C_norm": random(STATES),
        "dt_weight": random(CHANNELS, RANK),
        "dt_bias": random(CHANNELS),
        "A_log": random(CHANNELS, STATES),
        "D": random(CHANNELS),
        "state": random(8, CHANNELS, STATES, dtype=torch.float32)[:texts],
        "x": random(8, CHANNELS)[:texts],
        "parameters": random(8, RANK + 2 * STATES)[:texts],
        "gate": random(8, 2 * CHANNELS)[:texts, CHANNELS:],
    }
    return StateInputs(**tensors | dict.fromkeys(without), eps=1e-3)


def own(inputs: Any) -> Any:
    """Return inputs with tensors of their own that are written, of the same strides."""
    written = {"key", "value", "tails", "state"} & set(inputs._fields)
    copies = {name: getattr(inputs, name) for name in written}
    return inputs._replace(**{name: x if x is None else _copy(x) for name, x in copies.items()})


def _copy(x: Tensor) -> Tensor:
    whole = x.new_zeros(x.untyped_storage().nbytes() // x.itemsize)
    return whole.as_strided(x.shape, x.stride(), x.storage_offset()).copy_(x)


def check(triton: Any, twin: Any, inputs: Any, close: Tolerance) -> None:
    results = []
    for function in (triton, twin):
        copy = own(inputs)
        outputs = function(copy)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        written = [x for name, x in copy._asdict().items() if name in {"key", "value", "tails", "state"}]
        results.append([*outputs, *(x for x in written if x is not None)])
    for actual, expected in zip(*results, strict=True):
        assert actual.dtype == expected.dtype
        close.check(actual, expected)


@each_dtype
@pytest.mark.parametrize(
    ("without", "options"),
    [
        ((), {}),
        (("key", "value"), {"per_head": True}),
        (("q_norm", "k_norm"), {}),
        (("tables",), {"per_head": True}),
        (("q_norm", "k_norm", "tables", "conv_bias"), {"taps": 1}),
        ((), {"taps": 2, "weights": torch.float32}),
    ],
    ids=["everything", "keys of another layer", "no norms", "no rope", "bare", "float32 weights"],
)
def test_prepare_equals_its_twin(dtype: torch.dtype, without: tuple[str, ...], options: dict[str, Any]) -> None:
    check(triton_prepare, _separate_prepare, token_inputs(dtype, without=without, **options), CLOSE[dtype])


@each_dtype
@pytest.mark.parametrize("without", [(), ("dt_norm", "B_norm", "C_norm"), ("dt_bias",)], ids=" ".join)
def test_update_equals_its_twin(dtype: torch.dtype, without: tuple[str, ...]) -> None:
    check(triton_update, _separate_update, state_inputs(dtype, without=without), CLOSE[dtype])


@pytest.mark.parametrize(("rows", "inner", "width"), [(1, 32, 64), (3, 40, 70), (33, 8, 8)])
def test_gate_up_equals_its_twin(rows: int, inner: int, width: int) -> None:
    x = torch.randn(rows, width + 8, device=DEVICE).bfloat16()[:, :width]
    gate, up = torch.randn(2, inner, width, device=DEVICE).bfloat16() / width**0.5
    BFLOAT16.check(triton_gate_up(x, gate, up), _separate_gate_up(x, gate, up))


def test_a_text_gives_the_same_alone_and_among_others() -> None:
    alone, among = own(state_inputs(torch.float32, texts=1)), own(state_inputs(torch.float32, texts=8))
    assert triton_update(alone).equal(triton_update(among)[:1])
    assert alone.state.equal(among.state[:1])


def test_each_operation_is_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    started = launches(monkeypatch)
    triton_prepare(own(token_inputs(torch.bfloat16)))
    triton_update(own(state_inputs(torch.bfloat16)))
    assert started == ["prepare_token", "update_state"]


@pytest.mark.parametrize(
    ("operation", "sizes"),
    [(PREPARE, (2, 4, 1, 6, 8, 4)), (UPDATE, (8, 3, 2)), (GATE_UP, (8, 16, 2))],
    ids=["prepare", "update", "gate_up"],
)
def test_the_self_test_takes_the_sizes_of_the_model(operation: Operation, sizes: tuple[int, ...]) -> None:
    task = Task(DEVICE, torch.bfloat16, gradients=False, sizes=sizes)
    assert operation._self_test(operation.backends["triton"], task) is None


def decoded(model: HymbaForCausalLM, device: torch.device | str) -> Tensor:
    """Return the logits of two tokens of two texts, each after the prompts, on the CPU."""
    ids = torch.stack(random_texts([5, 5])).to(device)
    cache = HymbaCache(model.config)
    with torch.no_grad():
        model(ids[:, :3], cache=cache)
        return torch.cat([to_host(model(ids[:, i : i + 1], cache=cache).logits) for i in range(3, 5)], 1)


def test_a_model_decodes_by_kernels_what_it_decodes_on_a_cpu() -> None:
    model = tiny_model(torch.bfloat16, num_hidden_layers=2, global_attn_idx=[0], kv_reuse_group=[[0, 1]], kq_norm="rms")
    expected = decoded(model, "cpu")
    before = use_kernels(scan="torch", elementwise="torch")  # interpreting their kernels would take long
    try:
        with simulated_device(), counted() as counts:
            actual = decoded(to_device(model), SIMULATED)
    finally:
        use_kernels(**before)
    assert {"prepare_token", "update_state", "multiply_gate_up", "addmm_"} <= counts.launches.keys()
    BFLOAT16_MODEL.check(actual, expected)


@pytest.mark.parametrize("texts", [1, 8])
def test_a_decoded_token_takes_12_launches_a_layer_and_no_wait(texts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_token_triton, "_parts", lambda *_, **__: 2)
    launched = []
    for layers in (3, 4):
        ids = torch.stack(random_texts([3] * texts))
        with simulated_device(interpret=False), torch.no_grad():
            model = to_device(tiny_model(torch.bfloat16, num_hidden_layers=layers, global_attn_idx=[0]))
            cache = HymbaCache(model.config)
            ids = ids.to(SIMULATED)
            model(ids, cache=cache)
            model(ids[:, :1], cache=cache)  # full buffers grow by many columns at a time
            with counted() as counts:
                model(ids[:, :1], cache=cache)
        assert not counts.waits
        launched.append(counts.launches)

    a_layer = launched[1] - launched[0]
    assert a_layer.total() <= LAUNCHES_OF_A_LAYER, a_layer

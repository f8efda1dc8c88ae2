"""The Triton scan against the naive twin, interpreted without a GPU."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from triton import Config

from hymba_tune.model import scan_triton, scan_triton_kernels
from hymba_tune.model.scan import selective_scan
from hymba_tune.model.scan_inputs import ScanInputs
from hymba_tune.model.scan_triton import triton_scan, triton_unavailable_reason
from hymba_tune.model.scan_triton_gradient_kernels import front_gradients, input_gradients
from hymba_tune.model.scan_triton_kernels import chunk_ends, outputs
from tests.model.scan_inputs import WITHOUT, naive, random_inputs, with_gradients
from tests.tolerances import BFLOAT16, FLOAT32, FLOAT32_GRADIENT

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = [1, 0, 5]
"""Texts of one chunk, no chunk and two chunks."""


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use blocks so small that a few tokens and channels need several; skip if Triton is not installed."""
    if reason := triton_unavailable_reason():
        pytest.skip(reason)
    for name, size in {"CHUNK": 4, "GROUP": 1, "CHANNELS": 4, "CARRIED": 2, "CARRYING": 4, "SUMMED": 2}.items():
        monkeypatch.setattr(scan_triton, name, size)
    if scan_triton.INTERPRETED:
        for kernel, chosen in {chunk_ends: 16, outputs: 16, front_gradients: 16, input_gradients: 8}.items():
            sizes = {"STATES": chosen} | ({"HELD": 2} if kernel is input_gradients else {})
            monkeypatch.setattr(kernel, "configs", [Config(sizes)])


def scan(inputs: Mapping[str, Any], lengths: list[int]) -> tuple[Tensor, Tensor]:
    state = inputs.get("initial")
    if state is not None and state.ndim == 2:
        state = state.expand(len(lengths), -1, -1)
    tensors = {field: inputs.get(field) for field in ScanInputs._fields}
    tensors["fuses_meta_prefix"] = inputs.get("fuses_meta_prefix", False)
    return triton_scan(ScanInputs(**tensors | {"state": state, "offsets": (0, *accumulate(lengths))}))


def leaves(inputs: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {name: x.detach().to(DEVICE, dtype).requires_grad_() for name, x in inputs.items()}


def expected(inputs: Mapping[str, Tensor], lengths: list[int], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Return outputs, y rounded to a dtype, and gradients of the naive twin; an empty text keeps its state."""
    wide = {name: x.detach().to("cpu", torch.float64).requires_grad_() for name, x in inputs.items()}
    state = wide.get("initial", torch.zeros(len(lengths), *wide["A"].shape).double())
    state = state.expand(len(lengths), *wide["A"].shape)
    full = torch.tensor([text for text, length in enumerate(lengths) if length])
    y, final = naive(wide | {"initial": state[full]}, [length for length in lengths if length])
    return with_gradients(wide, (y.to(dtype), state.index_copy(0, full, final)))


def check(actual: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert actual.keys() == wanted.keys()
    for name, tensor in actual.items():
        full = FLOAT32 if name in ("y", "final state") else FLOAT32_GRADIENT
        (full if tensor.dtype == torch.float32 else BFLOAT16).check(tensor.cpu(), wanted[name], name)


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("without", WITHOUT.values(), ids=WITHOUT.keys())
def test_equals_naive_twin(without: tuple[str, ...]) -> None:
    inputs = leaves(random_inputs(LENGTHS, without=without))
    check(with_gradients(inputs, scan(inputs, LENGTHS)), expected(inputs, LENGTHS))


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize(
    ("tokens", "channels", "states", "chunk"),
    [(1, 1, 1, 4), (7, 2, 16, 4), (7, 9, 2, 2), (65, 2, 4, 32)],
)
def test_sizes_of_one_and_odd_sizes_equal_the_naive_twin(
    tokens: int, channels: int, states: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan_triton, "CHUNK", chunk)
    inputs = leaves(random_inputs([tokens], channels=channels, states=states))
    check(with_gradients(inputs, scan(inputs, [tokens])), expected(inputs, [tokens]))


@pytest.mark.usefixtures("triton")
def test_one_initial_state_for_every_text() -> None:
    inputs = leaves(random_inputs(LENGTHS, shared=True))
    check(with_gradients(inputs, scan(inputs, LENGTHS)), expected(inputs, LENGTHS))


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("lengths", [[3], [6, 1, 0, 5], [0, 3]], ids=str)
def test_chained_texts_continue_from_the_first(lengths: list[int]) -> None:
    inputs = leaves(random_inputs(lengths, without=("initial", "dt_bias")))
    actual = with_gradients(inputs, scan(inputs | {"fuses_meta_prefix": True}, lengths))

    rows = [lengths[0], sum(lengths[1:])]
    wide = {name: x.detach().to("cpu", torch.float64).requires_grad_() for name, x in inputs.items()}
    first, others = ({n: x.split(rows)[i] if len(x) == sum(rows) else x for n, x in wide.items()} for i in (0, 1))
    y, state = selective_scan(**first, backend="reference")
    if others["u"].numel():
        offsets = (0, *accumulate(lengths[1:]))
        after = selective_scan(**others, initial_state=state[0], cu_seqlens=offsets, backend="reference")
        y, state = (torch.cat(pair) for pair in zip((y, state), after, strict=True))
    check(actual, with_gradients(wide, (y, state)))


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize(
    ("dtype", "narrow"),
    [(torch.bfloat16, ("u", "dt", "B", "C", "z")), (torch.bfloat16, ("u", "B", "C", "z")), (torch.float16, ("dt",))],
    ids=["bfloat16", "float32 time steps", "float16 time steps"],
)
def test_each_input_has_its_own_dtype(dtype: torch.dtype, narrow: tuple[str, ...]) -> None:
    inputs = random_inputs([5])
    inputs = leaves(inputs) | leaves({name: inputs[name] for name in narrow}, dtype)
    actual = with_gradients(inputs, scan(inputs, [5]))
    assert actual["y"].dtype == inputs["u"].dtype
    assert actual["final state"].dtype == torch.float32
    assert all(actual[name].dtype == x.dtype for name, x in inputs.items())
    check(actual, expected(inputs, [5], inputs["u"].dtype))


@pytest.mark.usefixtures("triton")
def test_autocast_does_not_change_the_results() -> None:
    inputs = leaves(random_inputs([5]))
    plain = with_gradients(inputs, scan(inputs, [5]))
    with torch.autocast(DEVICE, torch.bfloat16):
        results = with_gradients(inputs, scan(inputs, [5]))
    assert all(results[name].equal(x) for name, x in plain.items())


@pytest.mark.usefixtures("triton")
def test_columns_of_a_wider_matrix_and_transposed_inputs_give_the_same() -> None:
    inputs = leaves(random_inputs([5]))
    u, dt, z, B = torch.cat([inputs[name] for name in ("u", "dt", "z", "B")], 1).split([5, 5, 5, 3], 1)
    strided = inputs | {"u": u, "dt": dt, "z": z, "B": B}
    strided |= {name: inputs[name].mT.contiguous().mT for name in ("A", "C", "initial")}
    actual = with_gradients(strided, scan(strided, [5]))
    assert all(actual[name].equal(x) for name, x in with_gradients(inputs, scan(inputs, [5])).items())


@pytest.mark.usefixtures("triton")
def test_rows_that_lie_billions_of_elements_apart_give_the_same(tmp_path: Path) -> None:
    inputs = leaves(random_inputs([6], without=("initial",)))
    far = dict(inputs)
    for name in ("u", "z"):
        stride = 2**29 - 8  # four rows further, an offset exceeds 32 bits; a sparse file needs no memory
        size = 5 * stride + inputs[name].shape[1]
        whole = torch.from_file(str(tmp_path / name), shared=True, size=size, dtype=torch.float32)
        far[name] = whole.as_strided(inputs[name].shape, (stride, 1)).copy_(inputs[name].detach()).requires_grad_()
    actual = with_gradients(far, scan(far, [6]))
    assert all(actual[name].equal(x) for name, x in with_gradients(inputs, scan(inputs, [6])).items())


@pytest.mark.usefixtures("triton")
def test_the_result_is_deterministic_and_does_not_depend_on_other_texts() -> None:
    inputs = leaves(random_inputs([2, 5]))
    first, second = (with_gradients(inputs, scan(inputs, [2, 5])) for _ in range(2))
    assert all(second[name].equal(x) for name, x in first.items())
    alone = {name: x[2:] if len(x) == 7 else x for name, x in inputs.items()}
    y, final = scan(alone | {"initial": inputs["initial"][1:]}, [5])
    assert y.equal(first["y"][2:])
    assert final.equal(first["final state"][1:])


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("output", [0, 1], ids=["y", "final state"])
@pytest.mark.parametrize("wanted", [("u",), ("A", "dt_bias"), ("initial", "C")], ids="-".join)
def test_gradients_of_some_inputs_from_one_output(wanted: tuple[str, ...], output: int) -> None:
    inputs = random_inputs([3])
    narrow = {name: x.requires_grad_(name in wanted) for name, x in leaves(inputs).items()}
    grads = [
        torch.autograd.grad(outputs[output].sum(), [leaves_of[name] for name in wanted], materialize_grads=True)
        for leaves_of, outputs in ((narrow, scan(narrow, [3])), (inputs, naive(inputs, [3])))
    ]
    for name, actual, exact in zip(wanted, *grads, strict=True):
        FLOAT32_GRADIENT.check(actual.cpu(), exact, name)


@pytest.mark.usefixtures("triton")
def test_one_state_per_chunk_is_saved() -> None:
    inputs = leaves(random_inputs([6, 3]))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        scan(inputs, [6, 3])
        chunks = 3
        input_elements = sum(x.numel() for name, x in inputs.items() if name != "initial")
        assert sum(x.numel() for x in saved) == input_elements + chunks * inputs["A"].numel()
        saved.clear()
        with torch.no_grad():
            scan(inputs, [6, 3])
    assert not saved


@pytest.mark.usefixtures("triton")
def test_time_steps_of_any_size_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "configs", [Config({"STATES": 256})])
    dt = torch.cat([torch.linspace(-80, 80, 151), torch.tensor([-1e30, 1e30])])[None].to(DEVICE)
    one = torch.ones(1, 1, device=DEVICE)
    y, _ = scan({"u": torch.ones_like(dt), "dt": dt, "A": torch.zeros_like(dt).mT, "B": one, "C": one}, [1])
    time = torch.nn.functional.softplus(dt.double())
    FLOAT32.check(torch.where(time > 0, y / time, 1 + y), torch.ones_like(time))


@pytest.mark.usefixtures("triton")
def test_values_that_are_not_finite_stay_in_their_channel() -> None:
    inputs = leaves(random_inputs([4]))
    clean, _ = scan(inputs, [4])
    u = inputs["u"].detach().clone()
    u[1, 2] = float("nan")
    y, _ = scan(inputs | {"u": u}, [4])
    assert y[1:, 2].isnan().all()
    y[1:, 2] = clean[1:, 2]
    assert y.equal(clean)


def test_gives_the_reason_if_it_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_triton, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(scan_triton, "INSTALLED", True)
    assert "no CUDA or ROCm device was found; with TRITON_INTERPRET=1" in str(triton_unavailable_reason())
    monkeypatch.setattr(scan_triton, "INSTALLED", False)
    assert triton_unavailable_reason() == "triton is not installed; pip install triton"


def test_imports_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    path = Path(scan_triton_kernels.__file__)
    spec = importlib.util.spec_from_file_location("kernels_without_triton", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert not module.INSTALLED


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[8192], [0, 1, 127, *[128] * 61]], ids=["one long text", "64 texts"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_equals_torch(dtype: torch.dtype, lengths: list[int]) -> None:
    inputs = random_inputs(lengths, channels=3200, states=16)
    narrow = leaves(inputs) | leaves({name: inputs[name] for name in ("u", "B", "C", "z")}, dtype)
    tensors = {name: x for name, x in narrow.items() if name != "initial"}
    wanted = selective_scan(
        **tensors, initial_state=narrow["initial"], cu_seqlens=(0, *accumulate(lengths)), backend="torch"
    )
    exact = {name: x.cpu() for name, x in with_gradients(narrow, wanted).items()}
    actual, again = (with_gradients(narrow, scan(narrow, lengths)) for _ in range(2))
    check(actual, exact)
    assert all(again[name].equal(x) for name, x in actual.items())

"""The C++ scan against the recurrence in float64."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from hymba_tune.model.scan import selective_scan
from hymba_tune.model.scan_inputs import ScanInputs
from hymba_tune.model.scan_native import CHUNK, LIBRARY, native_scan
from tests.tolerances import FLOAT32, Tolerance

BFLOAT16_ROUNDING = Tolerance(4e-3, float("inf"), "the result alone is rounded, once, to eight bits")
LENGTHS = {1: [1], 7: [3, 0, 4], 65: [0, 1, 32, 0, 32]}
"""Texts by their total length; some are empty, have one token, or end with a chunk."""
OPTIONAL = ("D", "z", "dt_bias", "initial_state")


@pytest.fixture
def native() -> None:
    """Skip if there is no compiler; the tests of the fallback cover this case."""
    if reason := LIBRARY.unavailable_reason():
        pytest.skip(reason)


def random_inputs(
    lengths: list[int], channels: int = 17, states: int = 5, *, without: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    tokens = sum(lengths)
    inputs = {
        "u": torch.randn(tokens, channels),
        "dt": torch.randn(tokens, channels) * 2 - 1,
        "A": -torch.rand(channels, states) * 4,
        "B": torch.randn(tokens, states),
        "C": torch.randn(tokens, states),
        "D": torch.randn(channels),
        "z": torch.randn(tokens, channels) * 2,
        "dt_bias": torch.randn(channels),
        "initial_state": torch.randn(len(lengths), channels, states),
    }
    return {name: x for name, x in inputs.items() if name not in without}


def scan(inputs: Mapping[str, Tensor], lengths: list[int], backend: str = "native") -> tuple[Tensor, Tensor]:
    return selective_scan(**inputs, cu_seqlens=torch.tensor([0, *lengths]).cumsum(0), backend=backend)


def with_gradients(inputs: Mapping[str, Tensor], lengths: list[int], backend: str = "native") -> dict[str, Tensor]:
    """Return the outputs, and the gradients of a randomly weighted sum of them."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    outputs = scan(leaves, lengths, backend)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator).bfloat16().to(x.dtype) for x in outputs]
    grads = torch.autograd.grad(outputs, list(leaves.values()), weights)
    return dict(zip(("y", "final state", *leaves), (*outputs, *grads), strict=True))


def reference(inputs: Mapping[str, Tensor], lengths: list[int]) -> dict[str, Tensor]:
    return with_gradients({name: x.double() for name, x in inputs.items()}, lengths, "reference")


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("states", [1, 4, 16])
@pytest.mark.parametrize("channels", [1, 15, 16, 17, 40, 640])
@pytest.mark.parametrize("tokens", [1, 7, 65])
def test_equals_reference(tokens: int, channels: int, states: int) -> None:
    lengths = LENGTHS[tokens]
    inputs = random_inputs(lengths, channels, states)
    FLOAT32.check_all(with_gradients(inputs, lengths), reference(inputs, lengths))


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("without", [*((name,) for name in OPTIONAL), OPTIONAL], ids="-".join)
def test_equals_reference_without(without: tuple[str, ...]) -> None:
    inputs = random_inputs(LENGTHS[65], without=without)
    FLOAT32.check_all(with_gradients(inputs, LENGTHS[65]), reference(inputs, LENGTHS[65]))


@pytest.mark.usefixtures("native")
def test_one_initial_state_for_every_text() -> None:
    inputs = random_inputs(LENGTHS[65])
    inputs["initial_state"] = inputs["initial_state"][0]
    FLOAT32.check_all(with_gradients(inputs, LENGTHS[65]), reference(inputs, LENGTHS[65]))


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("narrow", [("u", "dt", "B", "C", "z"), ("u",), ("dt", "C"), ("B", "z")], ids="-".join)
def test_bfloat16_inputs_are_computed_in_float32(narrow: tuple[str, ...]) -> None:
    inputs = random_inputs(LENGTHS[65])
    inputs |= {name: inputs[name].bfloat16() for name in narrow}
    actual, expected = with_gradients(inputs, LENGTHS[65]), reference(inputs, LENGTHS[65])
    for name, tensor in actual.items():
        assert tensor.dtype == (torch.bfloat16 if name in narrow or (name == "y" and "u" in narrow) else torch.float32)
        (FLOAT32 if tensor.dtype == torch.float32 else BFLOAT16_ROUNDING).check(tensor, expected[name], name)


@pytest.mark.usefixtures("native")
def test_bfloat16_is_rounded_to_nearest_even() -> None:
    u, D = torch.randn(100, 300).bfloat16(), torch.randn(300)
    D[:4] = torch.tensor([float("nan"), float("inf"), -float("inf"), 3.4e38])
    nothing = torch.zeros(100, 1)
    y, _ = scan({"u": u, "dt": u, "A": torch.zeros(300, 1), "B": nothing, "C": nothing, "D": D}, [100])
    torch.testing.assert_close(y, (u.float() * D).bfloat16(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.usefixtures("native")
def test_inputs_of_other_dtypes_are_cast() -> None:
    inputs = random_inputs(LENGTHS[65])
    inputs |= {"dt": inputs["dt"].half(), "A": inputs["A"].double(), "initial_state": inputs["initial_state"].half()}
    actual = with_gradients(inputs, LENGTHS[65])
    assert all(actual[name].dtype == x.dtype for name, x in inputs.items())
    FLOAT32.check(actual["y"], reference(inputs, LENGTHS[65])["y"])


@pytest.mark.usefixtures("native")
def test_columns_of_a_wider_matrix_and_transposed_inputs_give_the_same() -> None:
    inputs = random_inputs(LENGTHS[65])
    wide = torch.cat([inputs["u"], inputs["dt"], inputs["z"], inputs["B"]], 1)
    u, dt, z, B = wide.split([17, 17, 17, 5], 1)
    strided = inputs | {"u": u, "dt": dt, "z": z, "B": B, "C": inputs["C"].t().contiguous().t()}
    strided |= {"A": inputs["A"].t().contiguous().t(), "initial_state": inputs["initial_state"].mT.contiguous().mT}
    actual, expected = with_gradients(strided, LENGTHS[65]), with_gradients(inputs, LENGTHS[65])
    assert all(actual[name].equal(expected[name]) for name in expected)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("name", random_inputs([1]))
def test_the_gradient_of_one_input_alone_is_the_same(name: str) -> None:
    inputs = random_inputs(LENGTHS[7])
    leaf = inputs[name].clone().requires_grad_()
    y, _ = scan(inputs | {name: leaf}, LENGTHS[7])
    leaves = {key: x.clone().requires_grad_() for key, x in inputs.items()}
    scan(leaves, LENGTHS[7])[0].square().sum().backward()
    y.square().sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.equal(leaves[name].grad)


@pytest.mark.usefixtures("native")
def test_gradient_of_the_final_state_alone() -> None:
    inputs = random_inputs(LENGTHS[65])
    grads = {}
    for backend, dtype in (("native", torch.float32), ("reference", torch.float64)):
        leaves = {name: x.detach().to(dtype).requires_grad_() for name, x in inputs.items()}
        scan(leaves, LENGTHS[65], backend)[1].square().sum().backward()
        grads[backend] = {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in leaves.items()}
    FLOAT32.check_all(grads["native"], grads["reference"])


@pytest.mark.usefixtures("native")
def test_the_result_does_not_depend_on_threads_or_other_texts() -> None:
    lengths = [300, 1, 410]
    inputs = random_inputs(lengths, 200, 16)
    results = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        results.append(with_gradients(inputs, lengths))
    torch.set_num_threads(1)
    assert all(tensor.equal(results[0][name]) for result in results for name, tensor in result.items())
    alone = {name: x[301:] if len(x) == 711 else x for name, x in inputs.items()}
    alone["initial_state"] = inputs["initial_state"][2:]
    y, final = scan(alone, [410])
    assert y.equal(results[0]["y"][301:])
    assert final.equal(results[0]["final state"][2:])


@pytest.mark.usefixtures("native")
def test_one_state_per_chunk_of_tokens_is_saved() -> None:
    lengths = [256, 64]
    inputs = random_inputs(lengths, 64, 16)
    saved: list[Tensor] = []
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        scan(leaves, lengths)
    expected = sum(x.numel() for name, x in inputs.items() if name != "initial_state")
    assert sum(x.numel() for x in saved) == expected + 320 // CHUNK * 64 * 16
    saved.clear()
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        scan(leaves, lengths)
    assert not saved


@pytest.mark.usefixtures("native")
def test_values_that_are_not_finite_stay_in_their_channel() -> None:
    inputs = random_inputs([20])
    clean, _ = scan(inputs, [20])
    for value in (float("nan"), float("inf"), -float("inf")):
        u = inputs["u"].clone()
        u[4, 6] = value
        y, final = scan(inputs | {"u": u}, [20])
        affected = ~y.isfinite()
        assert affected[4:, 6].all()
        assert not final[0, 6].isfinite().any()
        assert affected.sum() == 16
        assert y[~affected].equal(clean[~affected])


@pytest.mark.usefixtures("native")
def test_extreme_time_steps_and_growth_equal_the_reference() -> None:
    one = {"u": torch.ones(5, 1), "A": torch.tensor([[-1.0]]), "B": torch.ones(5, 1), "C": torch.ones(5, 1)}
    dt = torch.tensor([-200.0, -90.0, -20.0, 30.0, 1e6])[:, None]
    expected, _ = scan({**one, "dt": dt}, [1] * 5, "reference")
    torch.testing.assert_close(scan({**one, "dt": dt}, [1] * 5)[0], expected, rtol=1e-6, atol=1e-38)
    grows = one | {"A": torch.tensor([[50.0]]), "dt": torch.full((5, 1), 10.0)}
    assert scan(grows | {"initial_state": torch.ones(1, 1)}, [5])[0].isinf().all()


def test_wrong_shapes_and_devices_are_refused() -> None:
    inputs = random_inputs([3, 4])
    wrong = {"dt": (7, 16), "B": (8, 5), "A": (16, 5), "D": (16,), "initial_state": (3, 17, 5)}
    for name, shape in wrong.items():
        with pytest.raises(ValueError, match=rf"{name} has shape \({shape[0]},"):
            scan(inputs | {name: torch.zeros(shape)}, [3, 4])
    with pytest.raises(ValueError, match="D is on meta; expected cpu, where u is"):
        scan(inputs | {"D": torch.zeros(17, device="meta")}, [3, 4])
    for offsets in ([0, 3, 8], [1, 7], [0, 5, 3, 7], []):
        with pytest.raises(ValueError, match=r"cu_seqlens is .* expected offsets that rise from 0 to the 7 rows of u"):
            selective_scan(**random_inputs([7], without=OPTIONAL), cu_seqlens=torch.tensor(offsets))


def test_unsupported_inputs_are_refused_by_a_chosen_backend() -> None:
    inputs = {name: x.double() for name, x in random_inputs([3]).items()}
    with pytest.raises(
        ValueError,
        match=r"native cannot be used: it supports float32 and bfloat16, not float64; torch and reference can",
    ):
        scan(inputs, [3])
    meta = {name: x.float().to("meta") for name, x in inputs.items()}
    with pytest.raises(ValueError, match="native cannot be used: it runs on cpu, not on meta"):
        selective_scan(**meta, backend="native")


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("lengths", [[7], [20, 1, 0, 33], [0, 5, 17], [16, 16, 48]], ids=str)
def test_fused_texts_continue_from_the_first(lengths: list[int]) -> None:
    inputs = random_inputs(lengths, without=("initial_state", "dt_bias"))

    def fuses_meta_prefix() -> tuple[Tensor, Tensor]:
        offsets = tuple(torch.tensor([0, *lengths]).cumsum(0).tolist())
        return native_scan(ScanInputs(**leaves, dt_bias=None, state=None, offsets=offsets, fuses_meta_prefix=True))

    def one_after_the_other() -> tuple[Tensor, Tensor]:
        rows = [lengths[0], sum(lengths[1:])]
        first, others = ({n: x.split(rows)[i] if len(x) == sum(rows) else x for n, x in leaves.items()} for i in (0, 1))
        y, state = scan(first, lengths[:1], "reference")
        if len(lengths) == 1:
            return y, state
        after, states = scan(others | {"initial_state": state[0]}, lengths[1:], "reference")
        return torch.cat([y, after]), torch.cat([state, states])

    results = []
    for run, dtype in ((fuses_meta_prefix, torch.float32), (one_after_the_other, torch.float64)):
        leaves = {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}
        outputs = run()
        weights = [torch.linspace(-1, 1, x.numel()).view_as(x).to(dtype) for x in outputs]
        grads = torch.autograd.grad(outputs, list(leaves.values()), weights)
        results.append(dict(zip(("y", "final", *leaves), (*outputs, *grads), strict=True)))
    FLOAT32.check_all(*results)

"""The C++ scan against the recurrence in float64, and how it is built, kept and done without."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hymba_tune.model import scan_native
from hymba_tune.model.scan import selective_scan
from hymba_tune.model.scan_inputs import ScanInputs
from hymba_tune.model.scan_native import native_missing, native_scan
from tests.tolerances import FLOAT32, Tolerance

BFLOAT16_ROUNDING = Tolerance(4e-3, float("inf"), "the result alone is rounded, once, to eight bits")
LENGTHS = {1: [1], 7: [3, 0, 4], 65: [0, 1, 15, 16, 0, 33]}
"""By their tokens, texts of which some are empty, of one token, or end with a chunk."""
OPTIONAL = ("D", "z", "dt_bias", "initial_state")


@pytest.fixture
def native() -> None:
    """Skips where there is no compiler: the scan then takes another way, which the tests of the fallback check."""
    if reason := native_missing():
        pytest.skip(reason)


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, and no library loaded yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    scan_native._load.cache_clear()
    yield tmp_path / "hymba-tune"
    scan_native._load.cache_clear()


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
    """Outputs, and the gradients of a random weighing of them."""
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
def test_bfloat16_is_widened_inside(narrow: tuple[str, ...]) -> None:
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
def test_halves_and_doubles_in_other_places_are_cast() -> None:
    inputs = random_inputs(LENGTHS[65])
    inputs |= {"dt": inputs["dt"].half(), "A": inputs["A"].double(), "initial_state": inputs["initial_state"].half()}
    actual = with_gradients(inputs, LENGTHS[65])
    assert all(actual[name].dtype == x.dtype for name, x in inputs.items())
    FLOAT32.check(actual["y"], reference(inputs, LENGTHS[65])["y"])


@pytest.mark.usefixtures("native")
def test_columns_of_a_wider_matrix_and_transposed_inputs() -> None:
    inputs = random_inputs(LENGTHS[65])
    wide = torch.cat([inputs["u"], inputs["dt"], inputs["z"], inputs["B"]], 1)
    u, dt, z, B = wide.split([17, 17, 17, 5], 1)
    strided = inputs | {"u": u, "dt": dt, "z": z, "B": B, "C": inputs["C"].t().contiguous().t()}
    strided |= {"A": inputs["A"].t().contiguous().t(), "initial_state": inputs["initial_state"].mT.contiguous().mT}
    actual, expected = with_gradients(strided, LENGTHS[65]), with_gradients(inputs, LENGTHS[65])
    assert all(actual[name].equal(expected[name]) for name in expected)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("name", random_inputs([1]))
def test_gradient_of_one_input_alone(name: str) -> None:
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
def test_the_same_bits_on_any_number_of_threads_and_in_any_company() -> None:
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
def test_keeps_one_state_for_sixteen_tokens() -> None:
    lengths = [256, 64]
    inputs = random_inputs(lengths, 64, 16)
    saved: list[Tensor] = []
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        scan(leaves, lengths)
    given = sum(x.numel() for name, x in inputs.items() if name != "initial_state")
    assert sum(x.numel() for x in saved) == given + 320 // 16 * 64 * 16
    saved.clear()
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        scan(leaves, lengths)
    assert not saved


@pytest.mark.usefixtures("native")
def test_what_is_not_finite_stays_in_its_channel_and_reaches_the_outputs() -> None:
    inputs = random_inputs([20])
    clean, _ = scan(inputs, [20])
    for value in (float("nan"), float("inf"), -float("inf")):
        u = inputs["u"].clone()
        u[4, 6] = value
        y, final = scan(inputs | {"u": u}, [20])
        touched = ~y.isfinite()
        assert touched[4:, 6].all()
        assert not final[0, 6].isfinite().any()
        assert touched.sum() == 16
        assert y[~touched].equal(clean[~touched])


@pytest.mark.usefixtures("native")
def test_extreme_time_steps_and_growth() -> None:
    one = {"u": torch.ones(5, 1), "A": torch.tensor([[-1.0]]), "B": torch.ones(5, 1), "C": torch.ones(5, 1)}
    dt = torch.tensor([-200.0, -90.0, -20.0, 30.0, 1e6])[:, None]
    expected, _ = scan({**one, "dt": dt}, [1] * 5, "reference")
    torch.testing.assert_close(scan({**one, "dt": dt}, [1] * 5)[0], expected, rtol=1e-6, atol=1e-38)
    grows = one | {"A": torch.tensor([[50.0]]), "dt": torch.full((5, 1), 10.0)}
    assert scan(grows | {"initial_state": torch.ones(1, 1)}, [5])[0].isinf().all()


def test_shapes_and_devices_that_do_not_fit_are_refused() -> None:
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


def test_what_native_cannot_take_is_refused_when_forced() -> None:
    inputs = {name: x.double() for name, x in random_inputs([3]).items()}
    with pytest.raises(
        ValueError, match=r"native cannot be used: it takes float32 and bfloat16, not float64; torch and reference can"
    ):
        scan(inputs, [3])
    meta = {name: x.float().to("meta") for name, x in inputs.items()}
    with pytest.raises(ValueError, match="native cannot be used: it runs on cpu, not on meta"):
        selective_scan(**meta, backend="native")


@pytest.mark.usefixtures("cache_folder")
def test_without_a_compiler_torch_is_taken_and_the_reason_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    reason = native_missing()
    assert reason == ("no C++ compiler: no-such-compiler was not found; install g++ or clang++, or name one in $CXX")
    inputs = random_inputs([3])
    assert scan(inputs, [3], "auto")[0].equal(scan(inputs, [3], "torch")[0])
    with pytest.raises(ValueError, match=r"native cannot be used: no C\+\+ compiler: no-such-compiler"):
        scan(inputs, [3])
    with pytest.raises(RuntimeError, match=r"native scan cannot run: no C\+\+ compiler: no-such-compiler"):
        native_scan(ScanInputs(*(inputs[name] for name in scan_native.INPUTS), None, (0, 3)))


@pytest.mark.usefixtures("cache_folder")
@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo out of paper >&2; exit 1", "failed: out of paper"),
        ("for last; do :; done; echo junk > $last", "invalid ELF header|file too short|slice|not valid"),
    ],
)
def test_a_compiler_that_fails_is_reported(
    script: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(ValueError, match=f"native cannot be used: .*({reason})"):
        scan(random_inputs([3]), [3])
    scan(random_inputs([3]), [3], "auto")


@pytest.mark.usefixtures("native")
def test_compiled_once_and_kept(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert native_missing() is None
    assert [path.suffix for path in cache_folder.iterdir()] == [".so"]
    scan_native._load.cache_clear()
    asked: list[list[str]] = []
    output = scan_native._output
    monkeypatch.setattr(scan_native, "_output", lambda command: asked.append(command) or output(command))
    assert native_missing() is None
    assert ["-E" in command for command in asked] == [True]  # only what the compiler and the CPU are


@pytest.mark.usefixtures("native")
def test_another_compiler_flag_is_another_library(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for flags in (scan_native.FLAGS, (*scan_native.FLAGS, "-O1")):
        monkeypatch.setattr(scan_native, "FLAGS", flags)
        scan_native._load.cache_clear()
        assert native_missing() is None
    assert len(list(cache_folder.iterdir())) == 2


@pytest.mark.usefixtures("native")
def test_a_cache_that_cannot_be_written_is_done_without(
    cache_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert native_missing() is None
    assert not cache_folder.exists()


@pytest.mark.usefixtures("native")
def test_two_processes_may_compile_at_once(cache_folder: Path) -> None:
    code = "from hymba_tune.model.scan_native import native_missing as reason; raise SystemExit(reason())"
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert [path.suffix for path in cache_folder.iterdir()] == [".so"]

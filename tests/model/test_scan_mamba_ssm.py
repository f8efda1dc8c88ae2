"""The scan of mamba-ssm against the naive twin; without a GPU, a stand-in replaces the kernel."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from hymba_tune.model import scan_mamba_ssm
from hymba_tune.model.scan_inputs import ScanInputs
from hymba_tune.model.scan_mamba_ssm import mamba_ssm_scan, mamba_ssm_unavailable_reason
from tests.reference import fake_kernels
from tests.reference.naive_scan import naive_scan
from tests.tolerances import BFLOAT16, FLOAT32, FLOAT32_GRADIENT, FLOAT64

LENGTHS = {
    "one_text_of_1": [1],
    "one_text_of_65": [65],
    "texts_of_1": [1, 1, 1],
    "texts_of_any_length": [7, 1, 30, 12],
    "an_empty_text": [5, 0, 7],
    "only_empty_texts": [0, 0],
}
CHANNELS, STATES = 5, 3


@pytest.fixture(autouse=True)
def _clear_cache() -> Iterator[None]:
    mamba_ssm_unavailable_reason.cache_clear()
    yield
    mamba_ssm_unavailable_reason.cache_clear()


@pytest.fixture
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for module in fake_kernels.mamba_ssm_modules():
        monkeypatch.setitem(sys.modules, module.__name__, module)


def random_inputs(lengths: list[int], *, optional: bool = True) -> dict[str, Tensor]:
    """Return float64 leaves, some of which are columns of one wide matrix, like the outputs of a projection."""
    tokens = sum(lengths)
    u, dt, z = torch.randn(tokens, 3 * CHANNELS).double().split(CHANNELS, 1)
    inputs = {"u": u, "dt": dt, "A": -torch.rand(CHANNELS, STATES), "B": torch.randn(tokens, STATES)}
    inputs["C"] = torch.randn(tokens, STATES)
    if optional:
        inputs |= {"D": torch.randn(CHANNELS), "z": z, "dt_bias": torch.randn(CHANNELS)}
    return {name: x.double().requires_grad_() for name, x in inputs.items()}


def scan(inputs: dict[str, Tensor], lengths: list[int]) -> tuple[Tensor, Tensor]:
    offsets = (0, *torch.tensor(lengths).cumsum(0).tolist())
    fields = {field: inputs.get(field) for field in ScanInputs._fields} | {"offsets": offsets}
    return mamba_ssm_scan(ScanInputs(**fields))


def naive(inputs: dict[str, Tensor], lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Scan each text alone; the final state of a text without tokens is zero."""
    rows = {name: x.split(lengths) for name, x in inputs.items() if name in ("u", "dt", "B", "C", "z")}
    outputs, finals = [inputs["u"] * 0], []
    for text, length in enumerate(lengths):
        inputs_of_text = inputs | {name: parts[text] for name, parts in rows.items()}
        y, final = naive_scan(**inputs_of_text) if length else (rows["u"][text], torch.zeros_like(inputs["A"]))
        outputs.append(y)
        finals.append(final)
    return torch.cat(outputs[1:]), torch.stack(finals)


def with_gradients(inputs: dict[str, Tensor], outputs: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Return the outputs, and the gradients of a randomly weighted sum of both."""
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(x.shape, generator=generator).to(x) for x in outputs]
    total = torch.stack([(x * weight).sum() for x, weight in zip(outputs, weights, strict=True)]).sum()
    gradients = torch.autograd.grad(total, list(inputs.values()), materialize_grads=True)
    return dict(zip(("y", "final", *inputs), (*outputs, *gradients), strict=True))


@pytest.mark.usefixtures("_installed")
@pytest.mark.parametrize("optional", [True, False], ids=["all_arguments", "no_optional_ones"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_equals_naive_twin(lengths: list[int], optional: bool) -> None:
    inputs = random_inputs(lengths, optional=optional)
    outputs = scan(inputs, lengths)
    assert outputs[1].is_contiguous()  # a cache updates it in place
    actual = with_gradients(inputs, outputs)
    FLOAT64.check_all(actual, with_gradients(inputs, naive(inputs, lengths)))


def test_a_kernel_from_the_hub_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    interface = SimpleNamespace(selective_scan_fn=fake_kernels.selective_scan_fn)
    kernel = SimpleNamespace(ops=SimpleNamespace(selective_scan_interface=interface))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(scan_mamba_ssm, "hub_kernel", {"mamba-ssm": kernel}.get)
    assert mamba_ssm_unavailable_reason() is None
    lengths = [7, 1, 20]
    inputs = random_inputs(lengths)
    FLOAT64.check_all(with_gradients(inputs, scan(inputs, lengths)), with_gradients(inputs, naive(inputs, lengths)))


@pytest.mark.usefixtures("_installed")
def test_bfloat16_inputs_and_float32_time_steps() -> None:
    lengths = LENGTHS["texts_of_any_length"]
    wide = {name: x.detach().bfloat16().double().requires_grad_() for name, x in random_inputs(lengths).items()}
    expected = with_gradients(wide, naive(wide, lengths))
    float32 = ("dt", "A", "D", "dt_bias")
    mixed = {
        name: x.detach().to(torch.float32 if name in float32 else torch.bfloat16).requires_grad_()
        for name, x in wide.items()
    }
    actual = with_gradients(mixed, scan(mixed, lengths))
    assert (actual["y"].dtype, actual["final"].dtype) == (torch.bfloat16, torch.float32)
    BFLOAT16.check_all(actual, expected)


@pytest.mark.usefixtures("_installed")
def test_it_is_available_if_it_is_installed() -> None:
    assert mamba_ssm_unavailable_reason() is None


@pytest.mark.usefixtures("_installed")
@pytest.mark.parametrize(
    ("absent", "reason"),
    [("mamba_ssm", "not installed"), ("selective_scan_cuda", "rebuild with MAMBA_KEEP_CUDA_BUILD=TRUE")],
)
def test_gives_the_reason_if_a_module_is_missing(monkeypatch: pytest.MonkeyPatch, absent: str, reason: str) -> None:
    for name in [name for name in sys.modules if name == absent or name.startswith(f"{absent}.")]:
        monkeypatch.delitem(sys.modules, name)
    assert reason in str(mamba_ssm_unavailable_reason())


def test_gives_the_reason_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert mamba_ssm_unavailable_reason() == "no CUDA device"


@pytest.mark.usefixtures("_installed")
@pytest.mark.parametrize(
    "error",
    [
        ImportError("undefined symbol: _ZN3c10"),  # from an extension built for another PyTorch
        ModuleNotFoundError("No module named 'einops'", name="einops"),
    ],
)
def test_gives_the_error_if_it_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch, error: ImportError) -> None:
    original = __import__

    def importing(name: str, *arguments: object) -> object:
        if name == "selective_scan_cuda":
            raise error
        return original(name, *arguments)

    monkeypatch.setattr("builtins.__import__", importing)
    assert mamba_ssm_unavailable_reason() == f"installed, but cannot be loaded: {error}"


def test_running_without_the_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match="mamba-ssm cannot be used: not installed"):
        scan(random_inputs([3]), [3])


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_on_cuda_equals_naive_twin(lengths: list[int]) -> None:
    assert mamba_ssm_unavailable_reason() is None
    wide = {name: x.detach().float().double().requires_grad_() for name, x in random_inputs(lengths).items()}
    expected = with_gradients(wide, naive(wide, lengths))
    narrow = {name: x.detach().float().cuda().requires_grad_() for name, x in wide.items()}
    actual = with_gradients(narrow, scan(narrow, lengths))
    for name, tensor in expected.items():
        (FLOAT32 if name in ("y", "final") else FLOAT32_GRADIENT).check(actual[name].cpu(), tensor, name)

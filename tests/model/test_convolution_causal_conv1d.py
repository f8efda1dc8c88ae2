"""The convolution of causal-conv1d against the naive twin; without a GPU, a stand-in replaces the kernel."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from hymba_tune.model import convolution_causal_conv1d
from hymba_tune.model.backends import Task
from hymba_tune.model.convolution import CONVOLUTION
from hymba_tune.model.convolution_causal_conv1d import (
    causal_conv1d_run,
    causal_conv1d_unavailable_reason,
    causal_conv1d_unsupported_reason,
)
from hymba_tune.model.documents import find_documents
from tests.reference import fake_kernels
from tests.reference.naive_convolution import naive_convolution
from tests.tolerances import BFLOAT16, FLOAT32, FLOAT32_GRADIENT, FLOAT64


@pytest.fixture(autouse=True)
def _clear_cache() -> Iterator[None]:
    causal_conv1d_unavailable_reason.cache_clear()
    yield
    causal_conv1d_unavailable_reason.cache_clear()


@pytest.fixture
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for module in fake_kernels.causal_conv1d_modules():
        monkeypatch.setitem(sys.modules, module.__name__, module)


def random_inputs(tokens: int, channels: int = 16, width: int = 4) -> dict[str, Tensor]:
    shapes = {"x": (tokens, channels), "weight": (channels, width), "bias": (channels,)}
    return {name: torch.randn(shape).double().requires_grad_() for name, shape in shapes.items()}


def with_gradients(inputs: dict[str, Tensor], y: Tensor) -> dict[str, Tensor]:
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y)
    return dict(zip(("y", *inputs), (y, *torch.autograd.grad(y, list(inputs.values()), weight)), strict=True))


@pytest.mark.usefixtures("_installed")
@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("channels", [16, 5], ids=["channels_of_eight", "channels_not_of_eight"])
@pytest.mark.parametrize("tokens", [1, 2, 7, 65])
def test_equals_naive_twin(tokens: int, channels: int, width: int) -> None:
    inputs = random_inputs(tokens, channels, width)
    actual = with_gradients(inputs, causal_conv1d_run(**inputs))
    FLOAT64.check_all(actual, with_gradients(inputs, naive_convolution(**inputs)[0]))


def test_a_kernel_from_the_hub_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    (module,) = fake_kernels.causal_conv1d_modules()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(convolution_causal_conv1d, "hub_kernel", {"causal-conv1d": module}.get)
    assert causal_conv1d_unavailable_reason() is None
    inputs = random_inputs(9)
    FLOAT64.check(causal_conv1d_run(**inputs), naive_convolution(**inputs)[0])


@pytest.mark.usefixtures("_installed")
def test_the_bias_is_optional() -> None:
    inputs = random_inputs(9)
    del inputs["bias"]
    actual = with_gradients(inputs, causal_conv1d_run(**inputs, bias=None))
    FLOAT64.check_all(actual, with_gradients(inputs, naive_convolution(**inputs)[0]))


@pytest.mark.usefixtures("_installed")
@pytest.mark.parametrize(("columns", "copied"), [(slice(8, 24), False), (slice(9, 25), True), (slice(0, 48, 3), True)])
def test_reads_the_columns_of_a_wider_matrix(monkeypatch: pytest.MonkeyPatch, columns: slice, copied: bool) -> None:
    wide = torch.randn(9, 48).double()
    inputs = random_inputs(9)
    received = []
    monkeypatch.setattr(
        sys.modules["causal_conv1d"],
        "causal_conv1d_fn",
        lambda x, *rest, **named: received.append(x) or fake_kernels.causal_conv1d_fn(x, *rest, **named),
    )
    x = wide[:, columns]
    FLOAT64.check(
        causal_conv1d_run(x, inputs["weight"], inputs["bias"]),
        naive_convolution(x, inputs["weight"], inputs["bias"])[0],
    )
    assert (received[0].data_ptr() != x.data_ptr()) == copied


@pytest.mark.usefixtures("_installed")
@pytest.mark.parametrize("channels", [16, 5], ids=["channels_of_eight", "channels_not_of_eight"])
@pytest.mark.parametrize("lengths", [[7], [3, 3], [1, 1, 1], [1, 6, 2]], ids=str)
@pytest.mark.parametrize(("meta", "cached"), [(0, False), (2, False), (9, False), (0, True)])
def test_packed_texts_in_one_call(
    meta: int, cached: bool, lengths: list[int], channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(
        sys.modules["causal_conv1d"],
        "causal_conv1d_fn",
        lambda *rest, **named: calls.append(named) or fake_kernels.causal_conv1d_fn(*rest, **named),
    )
    device = torch.device("cpu")
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    documents = find_documents((1, sum(lengths)), device, num_meta=meta, cu_seqlens=offsets)
    inputs = random_inputs(meta + sum(lengths), channels)
    if cached:
        inputs["tails"] = torch.randn(len(lengths), 3, channels).double().requires_grad_()

    results = []
    for name in ("causal_conv1d", "torch"):
        packed = CONVOLUTION.backends[name].run.packed
        x, weight, bias = (inputs[each] for each in ("x", "weight", "bias"))
        y, last = packed(x, weight, bias, documents, inputs.get("tails"), True)
        gradients = torch.autograd.grad((y.cos().sum(), last.cos().sum()), list(inputs.values()))
        results.append(dict(zip(("y", "last", *inputs), (y, last, *gradients), strict=True)))
    FLOAT64.check_all(*results)
    if channels % 8 == 0:
        (named,) = calls
        assert named["activation"] == "silu"
        unequal = len(set(lengths)) > 1 or (len(lengths) > 1 and not cached)
        assert ("seq_idx" in named) == unequal


@pytest.mark.usefixtures("_installed")
def test_the_bias_is_converted_to_the_dtype_of_the_weight() -> None:
    inputs = {name: x.detach() for name, x in random_inputs(9).items()}
    narrow = [inputs["x"].bfloat16(), inputs["weight"].bfloat16(), inputs["bias"].float()]
    y = causal_conv1d_run(*narrow)
    assert y.dtype == torch.bfloat16
    BFLOAT16.check(y, naive_convolution(*(x.double() for x in narrow))[0])


@pytest.mark.parametrize("width", [1, 5])
def test_other_widths_are_unsupported(width: int) -> None:
    assert (
        causal_conv1d_unsupported_reason(Task("cuda", torch.float32, taps=width))
        == f"it supports widths from 2 to 4, not {width}"
    )
    assert causal_conv1d_unsupported_reason(Task("cuda", torch.float32, taps=4)) is None


def test_running_without_the_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match="causal-conv1d cannot be used: not installed"):
        causal_conv1d_run(**random_inputs(9))


@pytest.mark.usefixtures("_installed")
def test_gives_the_reason_if_it_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    assert causal_conv1d_unavailable_reason() is None
    reasons = {
        ModuleNotFoundError("No module named 'causal_conv1d'", name="causal_conv1d"): "not installed",
        ModuleNotFoundError("No module named 'causal_conv1d_cuda'", name="causal_conv1d_cuda"): "without its kernels",
        ImportError("undefined symbol: _ZN3c10"): "cannot be loaded: undefined symbol",
    }
    original = __import__
    for error, reason in reasons.items():
        causal_conv1d_unavailable_reason.cache_clear()

        def importing(name: str, *arguments: object, error: Exception = error) -> object:
            if name == "causal_conv1d":
                raise error
            return original(name, *arguments)

        monkeypatch.setattr("builtins.__import__", importing)
        assert reason in str(causal_conv1d_unavailable_reason())
    causal_conv1d_unavailable_reason.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert causal_conv1d_unavailable_reason() == "no CUDA device"


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [16, 5])
@pytest.mark.parametrize("tokens", [1, 7, 65])
def test_on_cuda_equals_naive_twin(tokens: int, channels: int) -> None:
    assert causal_conv1d_unavailable_reason() is None
    wide = {name: x.detach().float().double().requires_grad_() for name, x in random_inputs(tokens, channels).items()}
    expected = with_gradients(wide, naive_convolution(**wide)[0])
    narrow = {name: x.detach().float().cuda().requires_grad_() for name, x in wide.items()}
    actual = with_gradients(narrow, causal_conv1d_run(**narrow))
    for name, tensor in expected.items():
        (FLOAT32 if name == "y" else FLOAT32_GRADIENT).check(actual[name].cpu(), tensor, name)

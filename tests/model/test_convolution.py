"""The convolution of many texts against the naive twin on each: outputs, last inputs and all gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from hymba_tune.model.convolution import causal_conv1d
from hymba_tune.model.convolution_native import LIBRARY, native_conv1d
from tests.reference.naive_convolution import naive_convolution
from tests.tolerances import BFLOAT16, FLOAT32, FLOAT32_GRADIENT, FLOAT64

LENGTHS = {
    "one_text_of_1": [1],
    "one_text_of_2": [2],
    "one_text_of_7": [7],
    "one_text_of_65": [65],
    "texts_of_1": [1, 1, 1, 1],
    "many_texts": [1, 7, 65, 2, 3, 1],
}
CHANNELS = 5


def random_inputs(lengths: list[int], width: int, initial: str, *, bias: bool = True) -> dict[str, Tensor]:
    """Return float64 leaves; the inputs before the texts are "none", "shared" or one "per_text"."""
    inputs = {"x": torch.randn(sum(lengths), CHANNELS), "weight": torch.randn(CHANNELS, width)}
    if bias:
        inputs["bias"] = torch.randn(CHANNELS)
    if initial != "none":
        texts = [len(lengths)] if initial == "per_text" else []
        inputs["initial"] = torch.randn(*texts, width - 1, CHANNELS)
    return {name: x.double().requires_grad_() for name, x in inputs.items()}


def convolve(inputs: dict[str, Tensor], lengths: list[int]) -> tuple[Tensor, Tensor]:
    return causal_conv1d(**inputs, cu_seqlens=torch.tensor([0, *lengths]).cumsum(0))


def naive(inputs: dict[str, Tensor], lengths: list[int]) -> tuple[Tensor, Tensor]:
    outputs, tails = [], []
    for text, x in enumerate(inputs["x"].split(lengths)):
        inputs_of_text = inputs | {"x": x}
        if "initial" in inputs and inputs["initial"].ndim == 3:
            inputs_of_text["initial"] = inputs["initial"][text]
        y, tail = naive_convolution(**inputs_of_text)
        outputs.append(y)
        tails.append(tail)
    return torch.cat(outputs), torch.stack(tails)


def with_gradients(inputs: dict[str, Tensor], outputs: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Return the outputs, and the gradients of a randomly weighted sum of them."""
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(x.shape, generator=generator).to(x) for x in outputs]
    pairs = [(output, weight) for output, weight in zip(outputs, weights, strict=True) if output.numel()]
    total = torch.stack([(output * weight).sum() for output, weight in pairs]).sum()
    grads = torch.autograd.grad(total, list(inputs.values()), materialize_grads=True)
    return dict(zip(("y", "tails", *inputs), (*outputs, *grads), strict=True))


@pytest.mark.parametrize("width", [1, 2, 4, 7])
@pytest.mark.parametrize("initial", ["none", "shared", "per_text"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_equals_naive_twin(lengths: list[int], initial: str, width: int) -> None:
    inputs = random_inputs(lengths, width, initial)
    actual = with_gradients(inputs, convolve(inputs, lengths))
    FLOAT64.check_all(actual, with_gradients(inputs, naive(inputs, lengths)))


def test_no_bias() -> None:
    inputs = random_inputs([7, 1], 4, "per_text", bias=False)
    actual = with_gradients(inputs, convolve(inputs, [7, 1]))
    FLOAT64.check_all(actual, with_gradients(inputs, naive(inputs, [7, 1])))


def test_one_text_needs_no_offsets() -> None:
    inputs = random_inputs([9], 4, "per_text")
    FLOAT64.check_all(with_gradients(inputs, causal_conv1d(**inputs)), with_gradients(inputs, convolve(inputs, [9])))


def test_float32_and_bfloat16_are_close_to_float64() -> None:
    lengths = LENGTHS["many_texts"]
    inputs = {
        name: x.detach().bfloat16().double().requires_grad_()
        for name, x in random_inputs(lengths, 4, "per_text").items()
    }
    expected = with_gradients(inputs, naive(inputs, lengths))
    for dtype, close, close_gradient in (
        (torch.float32, FLOAT32, FLOAT32_GRADIENT),
        (torch.bfloat16, BFLOAT16, BFLOAT16),
    ):
        narrow = {name: x.detach().to(dtype).requires_grad_() for name, x in inputs.items()}
        actual = with_gradients(narrow, convolve(narrow, lengths))
        assert actual["y"].dtype == dtype
        for name, tensor in expected.items():
            (close if name in ("y", "tails") else close_gradient).check(actual[name], tensor, name)


def test_gradcheck() -> None:
    lengths = [3, 1, 6]
    inputs = random_inputs(lengths, 4, "per_text")
    assert torch.autograd.gradcheck(
        lambda *tensors: convolve(dict(zip(inputs, tensors, strict=True)), lengths), tuple(inputs.values())
    )


def test_texts_continue_from_their_last_inputs() -> None:
    x, weight = torch.randn(9, CHANNELS).double(), torch.randn(CHANNELS, 4).double()
    whole, _ = causal_conv1d(x, weight)
    parts = []
    tail = None
    for part in x.split([1, 1, 5, 2]):
        y, tail = causal_conv1d(part, weight, initial=tail)
        parts.append(y)
    FLOAT64.check(torch.cat(parts), whole)


@pytest.mark.parametrize("tokens", [1, 5])
def test_an_unusable_backend_is_refused(tokens: int) -> None:
    x, weight = torch.randn(tokens, 3), torch.randn(3, 4)
    with pytest.raises(ValueError, match="conv backend causal_conv1d cannot be used: it runs on cuda, not on cpu"):
        causal_conv1d(x, weight, backend="causal_conv1d")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [1, 16, 17, 130])
@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("fuses_meta_prefix", [False, True], ids=["alone", "fuses_meta_prefix"])
@pytest.mark.parametrize("lengths", [[1], [2, 1, 65, 1], [7, 40, 2, 3, 1], [64, 33]], ids=str)
def test_native_equals_naive_twin(
    lengths: list[int], fuses_meta_prefix: bool, width: int, channels: int, dtype: torch.dtype
) -> None:
    if reason := LIBRARY.unavailable_reason():
        pytest.skip(reason)
    wide = torch.randn(sum(lengths), channels + 3).to(dtype)
    inputs = {"x": wide[:, 1 : channels + 1], "weight": torch.randn(channels, width), "bias": torch.randn(channels)}
    offsets = (0, *torch.tensor(lengths).cumsum(0).tolist())

    def one_after_the_other(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        texts = x.split(lengths)
        first, tail = naive_convolution(texts[0], weight, bias)
        initial = tail if fuses_meta_prefix else None
        return silu(torch.cat([first, *(naive_convolution(t, weight, bias, initial)[0] for t in texts[1:])]))

    def at_once(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return native_conv1d(x, weight, bias, offsets=offsets, fuses_meta_prefix=fuses_meta_prefix, silu=True)

    results = []
    for function, number in ((at_once, dtype), (one_after_the_other, torch.float64)):
        leaves = [x.detach().to(dtype).to(number).requires_grad_() for x in inputs.values()]
        y = function(*leaves)
        d_y = torch.linspace(-1, 1, y.numel()).view_as(y).bfloat16().to(number)
        results.append(dict(zip(("y", *inputs), (y, *torch.autograd.grad(y, leaves, d_y)), strict=True)))
    (FLOAT32_GRADIENT if dtype == torch.float32 else BFLOAT16).check_all(*results)


def test_native_refuses_wide_convolutions() -> None:
    x, weight = torch.randn(9, CHANNELS), torch.randn(CHANNELS, 5)
    with pytest.raises(ValueError, match=r"native cannot be used: .*(at most 4, not 5|no C\+\+ compiler)"):
        causal_conv1d(x, weight, backend="native")

"""Every backend of every operation computes in the dtypes of its inputs, whether or not autocast is on."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from hymba_tune.distill.chunks import Head, log_likelihood
from hymba_tune.model import HymbaConfig, HymbaForCausalLM, attention_flash, attention_flex, use_kernels
from hymba_tune.model.attention import cached_attention
from hymba_tune.model.backends import OPERATIONS, Backend, Operation, Problem, Task
from hymba_tune.model.convolution import shifted_products
from hymba_tune.model.log_probs import score_tokens
from hymba_tune.model.loss import linear_cross_entropy
from tests.reference import fake_kernels
from tests.tiny import CONFIG, gradients, random_texts
from tests.tolerances import BFLOAT16, BFLOAT16_MODEL, FLOAT32

CPU = Task("cpu", torch.float32)
EVERY = [
    (operation, backend)
    for operation in OPERATIONS.values()
    for backend in operation.backends.values()
    if backend.name != "triton"  # interpreted, its small problem takes minutes; test_scan_triton has a smaller one
]
ON_CPU = [(operation, backend) for operation, backend in EVERY if backend.devices in (None, ("cpu",))]
STAND_INS = (fake_kernels.flash_attn_modules, fake_kernels.mamba_ssm_modules, fake_kernels.causal_conv1d_modules)
PLAIN = {"scan": "torch", "attention": "blocks", "conv": "torch", "elementwise": "torch"}
"""What computes where there is no compiler."""
IDS = torch.stack(random_texts([16, 16]))

Mode = tuple[AbstractContextManager[object], AbstractContextManager[object]]
each_backend = pytest.mark.parametrize(
    ("operation", "backend"), EVERY, ids=[f"{operation.name}-{backend.name}" for operation, backend in EVERY]
)
each_backend_of_a_cpu = pytest.mark.parametrize(
    ("operation", "backend"), ON_CPU, ids=[f"{operation.name}-{backend.name}" for operation, backend in ON_CPU]
)
each_backward = pytest.mark.parametrize("inside", [False, True], ids=["backward_outside", "backward_inside"])


def autocast() -> AbstractContextManager[object]:
    return torch.autocast("cpu", torch.bfloat16)


@pytest.fixture(autouse=True)
def _restore_kernels() -> Iterator[None]:
    yield
    use_kernels(**dict.fromkeys(OPERATIONS, "auto"))


@pytest.fixture
def _stand_ins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Replace the kernels of other packages by plain torch, and do not compile FlexAttention."""
    for modules in STAND_INS:
        for module in modules():
            monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(attention_flash, "_provider", lambda *_, **__: attention_flash._flash_attn_2())
    monkeypatch.setattr(attention_flex, "_compiled", lambda: flex_attention)
    attention_flash._parts.cache_clear()
    yield
    attention_flash._parts.cache_clear()


def skip_if_missing(backend: Backend) -> None:
    if backend.devices == ("cpu",) and (reason := backend.unavailable_reason()):
        pytest.skip(reason)


def computed(problem: Problem, backend: Backend, *, forward: bool, backward: bool) -> dict[str, Tensor]:
    """Return outputs and gradients of a small problem; each of the two passes can run under autocast."""
    with autocast() if forward else nullcontext():
        outputs = problem.compute(backend)
    results = {f"output {i}": output for i, output in enumerate(outputs)}
    if not problem.leaves[0].requires_grad:
        return results
    weights = [torch.linspace(-1, 1, x.numel()).view_as(x).to(x.dtype) for x in outputs]
    with autocast() if backward else nullcontext():
        gradients = torch.autograd.grad(outputs, problem.leaves, weights)
    return results | {f"gradient {i}": gradient for i, gradient in enumerate(gradients)}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.usefixtures("_stand_ins")
@each_backward
@each_backend
def test_autocast_does_not_change_the_results(operation: Operation, backend: Backend, inside: bool) -> None:
    skip_if_missing(backend)
    # FlexAttention has no backward on the CPU.
    gradients = operation._trains and backend.name != "flex"
    problem = operation._problem(Task("cpu", torch.float32, gradients=gradients))
    expected = computed(problem, backend, forward=False, backward=False)
    actual = computed(problem, backend, forward=True, backward=inside)
    assert [x.dtype for x in actual.values()] == [x.dtype for x in expected.values()]
    for name, tensor in expected.items():
        # Autocast lowers the precision of PyTorch's own backwards if `backward` is called under it.
        (BFLOAT16 if inside and "gradient" in name else FLOAT32).check(actual[name], tensor, name)


def fresh_model() -> HymbaForCausalLM:
    """Return the same model on every call; the gradients of `tiny_model` have a noise of 20 % in bfloat16."""
    torch.manual_seed(0)
    return HymbaForCausalLM(HymbaConfig(**CONFIG))


def trained(model: HymbaForCausalLM, *, inside: bool) -> dict[str, Tensor | None]:
    """Return loss and gradients of one step under autocast."""
    with autocast():
        loss = model(IDS, labels=IDS, skip_logits=True).loss
    with autocast() if inside else nullcontext():
        loss.backward()
    return {"loss": loss.detach()} | gradients(model)


@each_backward
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_backend_of_a_cpu
def test_a_model_trains_under_autocast_with_every_backend(
    operation: Operation, backend: Backend, dtype: torch.dtype, inside: bool
) -> None:
    skip_if_missing(backend)
    use_kernels(**PLAIN)
    expected = fresh_model()
    loss = expected(IDS, labels=IDS).loss
    loss.backward()
    use_kernels(**PLAIN | {operation.name: backend.name})
    actual = trained(fresh_model().to(dtype), inside=inside)
    BFLOAT16_MODEL.check(actual.pop("loss"), loss)
    whole = [
        torch.cat([x.flatten().float() for x in named.values() if x is not None])
        for named in (actual, gradients(expected))
    ]
    BFLOAT16_MODEL.check(*whole, "gradients")


def test_the_plain_convolution_keeps_the_dtype_of_its_inputs_with_a_wider_bias() -> None:
    x, weight, bias = torch.randn(9, 5).bfloat16(), torch.randn(5, 4).bfloat16(), torch.randn(5)
    y = shifted_products(x, weight, bias)
    assert y.dtype == torch.bfloat16
    BFLOAT16.check(y, shifted_products(x.float(), weight.float(), bias))


def test_attention_to_a_cache_under_autocast_is_close_to_float32() -> None:
    query, key, value = torch.randn(2, 3, 4, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 16)
    cached = (torch.randn(5, 2, 8), torch.randn(5, 2, 16)), key, value, torch.rand(2, 3, 9) < 0.3
    expected = cached_attention(query, *cached)
    with autocast():
        actual = cached_attention(query, *cached)
    BFLOAT16.check(actual, expected)


def scores(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    log_probs = score_tokens(hidden[None], weight, targets[None]).log_probs
    assert log_probs is not None
    return log_probs


def likelihoods(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return log_likelihood(Head(hidden, weight), targets, 4)


@each_backward
@pytest.mark.parametrize("loss", [linear_cross_entropy, scores, likelihoods])
def test_losses_and_their_gradients_use_the_same_bfloat16_logits(
    loss: Callable[[Tensor, Tensor, Tensor], Tensor], inside: bool
) -> None:
    leaves = [torch.randn(9, 32).requires_grad_(), torch.randn(50, 32).requires_grad_()]
    targets = torch.randint(50, (9,))
    narrow = [leaf.detach().bfloat16().requires_grad_() for leaf in leaves]
    expected = loss(*narrow, targets)
    weights = torch.linspace(0.5, 1, expected.numel()).view_as(expected)
    with autocast():
        actual = loss(*leaves, targets)
    assert torch.equal(actual, expected)
    with autocast() if inside else nullcontext():
        gradients = torch.autograd.grad(actual, leaves, weights)
    for gradient, twin in zip(gradients, torch.autograd.grad(expected, narrow, weights), strict=True):
        torch.testing.assert_close(gradient.bfloat16(), twin, rtol=1e-2, atol=1e-6)

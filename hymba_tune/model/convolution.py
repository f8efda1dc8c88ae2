"""The causal depthwise convolution in front of the SSM, over packed texts.

Glossary: M meta tokens, T tokens, S texts, E channels, K width of the convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import silu

from .autocast import outside_autocast
from .backends import GPU_DTYPES, Backend, Operation, Problem, Task, random_leaves
from .convolution_causal_conv1d import (
    causal_conv1d_packed,
    causal_conv1d_run,
    causal_conv1d_unavailable_reason,
    causal_conv1d_unsupported_reason,
)
from .convolution_native import LIBRARY, native_conv1d, native_unsupported_reason
from .convolution_triton import triton_conv1d, triton_packed_conv1d
from .documents import Documents, find_documents, to_device
from .memoized import memoized
from .native import DTYPES
from .triton_kernels import triton_unavailable_reason


def packed_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, documents: Documents, tails: Tensor | None, *, keep: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Convolve the meta tokens and the texts, each text continued from the meta tokens or a cache, and apply silu.

    Args:
        x: ``(M + T, E)``.
        weight: ``(E, K)``.
        bias: ``(E,)`` or None.
        documents: The layout of the packed texts.
        tails: ``(S, K - 1, E)``, the cached inputs before each text; None if x contains the meta tokens.
        keep: Whether to return the last inputs.

    Returns:
        ``(M + T, E)``, and the last inputs of each text, ``(S, K - 1, E)``, for a cache.
    """
    task = Task.of(x, weight, bias, tails, taps=weight.shape[1])
    result: tuple[Tensor, Tensor | None]
    result = CONVOLUTION.compute(task, x, weight, bias, documents, tails, keep, function="packed")
    return result


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    initial: Tensor | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute a depthwise convolution in which token t sees the tokens t - K + 1 to t of its own text.

    Args:
        x: ``(T, E)``.
        weight: ``(E, K)``; ``weight[:, -1]`` is multiplied with the token itself.
        bias: ``(E,)``.
        initial: Inputs before the texts, ``(K - 1, E)`` for all or ``(S, K - 1, E)``. The default is zeros.
        cu_seqlens: ``(S + 1,)`` offsets of the texts. The default is one text. A tensor on a GPU synchronizes with it.
        backend: A key of ``CONVOLUTION.backends``, or "auto" for the fastest usable one. The default is the choice of
            `use_kernels`.

    Returns:
        ``(T, E)`` in x's dtype, and the last K - 1 inputs of each text, ``(S, K - 1, E)``.

    Raises:
        ValueError: If the backend is unknown or does not support these tensors.
    """
    task = Task.of(x, weight, bias, taps=weight.shape[1])
    CONVOLUTION.choose(task, backend)  # an unusable backend is refused even where the texts need no backend

    def alone(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = CONVOLUTION.compute(task, x, weight, bias, name=backend, function="alone")
        return y

    offsets = (0, x.shape[0]) if cu_seqlens is None else tuple(map(int, cu_seqlens))
    return _with_borders(alone, x, weight, bias, initial, offsets)


Alone = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def _with_borders(
    alone: Alone, x: Tensor, weight: Tensor, bias: Tensor | None, initial: Tensor | None, offsets: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Compute `causal_conv1d` with a function for one text that starts from zeros."""
    texts = len(offsets) - 1
    before = weight.shape[1] - 1
    initial = x.new_zeros(1, before, x.shape[1]) if initial is None else initial
    initial = initial.expand(texts, before, -1)
    if offsets == tuple(range(texts + 1)):
        # In a step of generation, each text has one token, whose window is that token and the inputs before it.
        windows = torch.cat([initial, x[:, None]], 1)
        products = (windows * weight.t()).sum(1)
        return (products if bias is None else products + bias).to(x.dtype), windows[:, 1:]

    y = alone(x, weight, bias)
    if before == 0:
        return y, initial

    # The first K - 1 tokens of a text see its initial inputs, not the tokens in front of them in x.
    borders = _borders(offsets, before, x.device)
    windows = torch.cat([initial, x[borders.first]], 1)
    heads = torch.stack([windows[:, k : k + before] * weight[:, k] for k in range(before + 1)]).sum(0)
    heads = heads if bias is None else heads + bias
    y = y.index_copy_(0, borders.first.flatten()[borders.own], heads.flatten(0, 1)[borders.own].to(y.dtype))
    return y, _last_inputs(x, initial, offsets)


def _packed_last_inputs(x: Tensor, documents: Documents, tails: Tensor | None, before: int) -> Tensor:
    """Return the last K - 1 inputs of packed texts."""
    x_meta, x_text = x.split([documents.num_meta, documents.starts[-1]])
    if tails is None:
        # The inputs before the first meta tokens are zeros.
        first = torch.nn.functional.pad(x_meta, (0, 0, before, 0))[len(x_meta) :]
        tails = first.expand(len(documents.lengths), -1, -1)
    return _last_inputs(x_text, tails, documents.starts)


def _last_inputs(x: Tensor, initial: Tensor, offsets: tuple[int, ...]) -> Tensor:
    """Return the last K - 1 inputs of each text, ``(S, K - 1, E)``; those of a short text include initial inputs."""
    borders = _borders(offsets, initial.shape[1], x.device)
    texts = torch.arange(len(initial), device=x.device)[:, None]
    return torch.where(borders.from_x[..., None], x[borders.last], initial[texts, borders.from_initial])


class _Borders(NamedTuple):
    """The first and last K - 1 tokens of each text. All tensors but ``own`` are ``(S, K - 1)``.

    Attributes:
        first: The rows of the first tokens. For a shorter text, they include rows of other texts.
        own: The indices, in the flattened ``first``, of the rows that belong to their text.
        last: The rows of the last tokens.
        from_x: Whether the row in ``last`` belongs to its text; if not, an initial input replaces it.
        from_initial: The index of that initial input.
    """

    first: Tensor
    own: Tensor
    last: Tensor
    from_x: Tensor
    from_initial: Tensor


@memoized
def _borders(offsets: tuple[int, ...], before: int, device: torch.device) -> _Borders:
    """Return the borders of the texts; they are memoized because all layers need the same ones."""
    bounds = torch.tensor(offsets, device="cpu")[:, None]
    steps = torch.arange(before, device="cpu")
    starts, ends = bounds[:-1], bounds[1:]
    first, last = starts + steps, ends - before + steps
    last_row = max(offsets[-1] - 1, 0)

    lengths = (end - start for start, end in pairwise(offsets))
    own = [text * before + step for text, length in enumerate(lengths) for step in range(min(before, length))]
    borders = _Borders(
        first.clamp(max=last_row),
        torch.tensor(own, dtype=torch.int64, device="cpu"),
        last.clamp(min=0),
        last >= starts,
        (last - starts + before).clamp(0, before - 1),
    )
    return _Borders(*(to_device(index, device) for index in borders))


def shifted_products(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve one text that starts from zeros, in plain torch, and return ``(T, E)``."""
    y: Tensor = _ShiftedProducts.apply(x, weight, bias)
    return y


class _ShiftedProducts(torch.autograd.Function):
    """The convolution as K shifted multiply-adds."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        taps = weight.t().contiguous()
        y = x * taps[-1] if bias is None else torch.addcmul(bias, x, taps[-1])
        for lag in range(1, min(len(taps), x.shape[0])):
            y[lag:].addcmul_(x[:-lag], taps[-1 - lag])
        return y.to(x.dtype)

    @staticmethod
    @outside_autocast
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        taps = weight.t().contiguous()
        dx = dy * taps[-1]
        d_taps = torch.zeros_like(taps)
        products = dy * x
        wide = torch.promote_types(x.dtype, torch.float32)
        d_taps[-1] = products.sum(0, dtype=wide)
        for lag in range(1, min(len(taps), x.shape[0])):
            dx[:-lag].addcmul_(dy[lag:], taps[-1 - lag])
            torch.mul(dy[lag:], x[:-lag], out=products[lag:])
            d_taps[-1 - lag] = products[lag:].sum(0, dtype=wide)
        return dx, d_taps.t(), dy.sum(0) if ctx.has_bias else None


Packed = Callable[
    [Tensor, Tensor, Tensor | None, Documents, Tensor | None, bool], tuple[Tensor, Tensor | None]
]  # the arguments of `packed_conv1d`


class Convolution(NamedTuple):
    """The functions of one backend: for one text that starts from zeros, and `packed_conv1d`."""

    alone: Alone
    packed: Packed


def _in_parts(alone: Alone) -> Packed:
    """Make a `packed_conv1d` that computes the meta tokens, the texts and their borders one after the other."""

    def packed(
        x: Tensor, weight: Tensor, bias: Tensor | None, documents: Documents, tails: Tensor | None, keep: bool
    ) -> tuple[Tensor, Tensor | None]:
        meta, starts = documents.num_meta, documents.starts
        if tails is not None or not meta:
            y, tails = _with_borders(alone, x, weight, bias, tails, starts)
            return silu(y), tails if keep else None
        x_meta, x_text = x.split([meta, starts[-1]])
        y_meta, tail = _with_borders(alone, x_meta, weight, bias, None, (0, meta))
        y_text, tails = _with_borders(alone, x_text, weight, bias, tail[0], starts)
        return silu(torch.cat([y_meta, y_text])), tails if keep else None

    return packed


def _native_packed(
    x: Tensor, weight: Tensor, bias: Tensor | None, documents: Documents, tails: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor | None]:
    meta = documents.num_meta
    if tails is not None or not meta:
        return _in_parts(native_conv1d)(x, weight, bias, documents, tails, keep)
    offsets = (0, *(meta + start for start in documents.starts))
    y = native_conv1d(x, weight, bias, offsets=offsets, fuses_meta_prefix=True, silu=True)
    return y, _packed_last_inputs(x, documents, None, weight.shape[1] - 1) if keep else None


def _causal_conv1d_packed(
    x: Tensor, weight: Tensor, bias: Tensor | None, documents: Documents, tails: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor | None]:
    if x.shape[1] % 8:
        # The package takes texts and initial inputs only where eight channels can be read at a time.
        return _in_parts(causal_conv1d_run)(x, weight, bias, documents, tails, keep)
    y = causal_conv1d_packed(x, weight, bias, documents, tails)
    return y, _packed_last_inputs(x, documents, tails, weight.shape[1] - 1) if keep else None


def _triton_packed(
    x: Tensor, weight: Tensor, bias: Tensor | None, documents: Documents, tails: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor | None]:
    gradients = torch.is_grad_enabled()
    if gradients and tails is not None and tails.requires_grad:
        return _in_parts(triton_conv1d)(x, weight, bias, documents, tails, keep)
    differentiable = keep and gradients and x.requires_grad
    y, last = triton_packed_conv1d(x, weight, bias, documents, tails, keep and not differentiable)
    return y, _packed_last_inputs(x, documents, tails, weight.shape[1] - 1) if differentiable else last


def _small_problem(task: Task) -> Problem:
    """Return a problem of one text, and of texts of which some are shorter than the convolution is wide."""
    x, weight, bias, tails = random_leaves(task, [(50, 24), (24, task.taps), (24,), (3, task.taps - 1, 24)])
    offsets = to_device([0, 1, 30, 32], x.device)
    fused, cached = (find_documents((1, 32), x.device, num_meta=meta, cu_seqlens=offsets) for meta in (18, 0))

    def compute(backend: Backend) -> tuple[Tensor, ...]:
        functions = backend.run
        y, last = functions.packed(x, weight, bias, fused, None, True)
        y_cached, last_cached = functions.packed(x[18:], weight, bias, cached, tails.detach(), True)
        return functions.alone(x, weight, bias), y, last, y_cached, last_cached

    return Problem(compute, [x, weight, bias])


CONVOLUTION = Operation(
    "conv",
    [
        Backend(
            "causal_conv1d",
            Convolution(causal_conv1d_run, _causal_conv1d_packed),
            ("cuda",),
            GPU_DTYPES,
            needs_self_test=True,
            unavailable_reason=causal_conv1d_unavailable_reason,
            unsupported_reason=causal_conv1d_unsupported_reason,
        ),
        Backend(
            "native",
            Convolution(native_conv1d, _native_packed),
            ("cpu",),
            DTYPES,
            unavailable_reason=LIBRARY.unavailable_reason,
            unsupported_reason=native_unsupported_reason,
        ),
        Backend(
            "triton",
            Convolution(triton_conv1d, _triton_packed),
            ("cuda",),
            GPU_DTYPES,
            needs_self_test=True,
            unavailable_reason=triton_unavailable_reason,
        ),
        Backend("torch", Convolution(shifted_products, _in_parts(shifted_products))),
    ],
    plain="torch",
    problem=_small_problem,
)
"""The convolution backends, the fastest first."""

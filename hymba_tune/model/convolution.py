"""The causal depthwise convolution in front of the SSM, over packed texts.

Glossary: M meta tokens, T tokens, S texts, E channels, K width of the convolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import silu

from .autocast import outside_autocast
from .backends import GPU_DTYPES, Backend, Operation, Problem, Task, memoized, random_leaves
from .convolution_causal_conv1d import (
    causal_conv1d_run,
    causal_conv1d_unavailable_reason,
    causal_conv1d_unsupported_reason,
)
from .convolution_native import LIBRARY, native_conv1d, native_unsupported_reason
from .documents import Documents, to_device
from .native import DTYPES


def packed_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, documents: Documents, tails: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Convolve the meta tokens and the texts, each text continued from the meta tokens or a cache, and apply silu.

    Args:
        x: ``(M + T, E)``.
        weight: ``(E, K)``.
        bias: ``(E,)`` or None.
        documents: The layout of the packed texts.
        tails: ``(S, K - 1, E)``, the cached inputs before each text; None if x contains the meta tokens.

    Returns:
        ``(M + T, E)``, and the last inputs of each text, ``(S, K - 1, E)``, for a cache.
    """
    meta = documents.num_meta
    starts = documents.starts
    if tails is not None or not meta:
        y, tails = causal_conv1d(x, weight, bias, initial=tails, cu_seqlens=starts)
        return silu(y), tails

    backend = CONVOLUTION.choose(Task.of(x, weight, bias, taps=weight.shape[1]))
    x_meta, x_text = x.split([meta, starts[-1]])
    if backend.fuses_meta_prefix:
        offsets = (0, *(meta + start for start in starts))
        y = backend.run(x, weight, bias, offsets=offsets, fuses_meta_prefix=True, silu=True)
        before = weight.shape[1] - 1
        first = torch.nn.functional.pad(x_meta, (0, 0, before, 0))[meta:]
        return y, _last_inputs(x_text, first.expand(len(starts) - 1, -1, -1), starts)

    y_meta, tail = causal_conv1d(x_meta, weight, bias)
    y_text, tails = causal_conv1d(x_text, weight, bias, initial=tail[0], cu_seqlens=starts)
    return silu(torch.cat([y_meta, y_text])), tails


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

    offsets = (0, x.shape[0]) if cu_seqlens is None else tuple(map(int, cu_seqlens))
    texts = len(offsets) - 1
    before = weight.shape[1] - 1
    initial = x.new_zeros(1, before, x.shape[1]) if initial is None else initial
    initial = initial.expand(texts, before, -1)
    if offsets == tuple(range(texts + 1)):
        # In a step of generation, each text has one token, whose window is that token and the inputs before it.
        windows = torch.cat([initial, x[:, None]], 1)
        products = (windows * weight.t()).sum(1)
        return (products if bias is None else products + bias).to(x.dtype), windows[:, 1:]

    y: Tensor = CONVOLUTION.compute(task, x, weight, bias, name=backend)
    if before == 0:
        return y, initial

    # The first K - 1 tokens of a text see its initial inputs, not the tokens in front of them in x.
    borders = _borders(offsets, before, x.device)
    windows = torch.cat([initial, x[borders.first]], 1)
    heads = torch.stack([windows[:, k : k + before] * weight[:, k] for k in range(before + 1)]).sum(0)
    heads = heads if bias is None else heads + bias
    y = y.index_copy_(0, borders.first.flatten()[borders.own], heads.flatten(0, 1)[borders.own].to(y.dtype))
    return y, _last_inputs(x, initial, offsets)


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


def _small_problem(task: Task) -> Problem:
    leaves = random_leaves(task, [(50, 24), (24, task.taps), (24,)])
    return Problem(lambda backend: (backend.run(*leaves),), leaves)


CONVOLUTION = Operation(
    "conv",
    [
        Backend(
            "causal_conv1d",
            causal_conv1d_run,
            ("cuda",),
            GPU_DTYPES,
            needs_self_test=True,
            unavailable_reason=causal_conv1d_unavailable_reason,
            unsupported_reason=causal_conv1d_unsupported_reason,
        ),
        Backend(
            "native",
            native_conv1d,
            ("cpu",),
            DTYPES,
            fuses_meta_prefix=True,
            unavailable_reason=LIBRARY.unavailable_reason,
            unsupported_reason=native_unsupported_reason,
        ),
        Backend("torch", shifted_products),
    ],
    plain="torch",
    problem=_small_problem,
)
"""The convolution backends, the fastest first."""

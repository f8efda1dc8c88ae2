"""The convolution of the package causal-conv1d (github.com/Dao-AILab/causal-conv1d): CUDA kernels of Mamba's authors.

Glossary: M meta tokens, T tokens, S texts, E channels, K width of the convolution.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from .backends import Task
from .documents import Documents, to_device
from .hub_kernels import hub_kernel
from .memoized import memoized

WIDTHS = range(2, 5)
"""The widths that the kernels support."""


def causal_conv1d_run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve one text that starts from zeros.

    Args:
        x: ``(T, E)``, on a GPU; the rows may be parts of the rows of a wider matrix.
        weight: ``(E, K)``, K from 2 to 4.
        bias: ``(E,)``.

    Returns:
        ``(T, E)``.
    """
    return _convolve(_channels_first(x)[None], weight, bias)[0].T


def causal_conv1d_packed(
    x: Tensor, weight: Tensor, bias: Tensor | None, documents: Documents, tails: Tensor | None
) -> Tensor:
    """Convolve the meta tokens and the texts in one call, and apply silu.

    Args:
        x: ``(M + T, E)``, E a multiple of 8.
        weight: ``(E, K)``, K from 2 to 4.
        bias: ``(E,)``.
        documents: The layout of the packed texts.
        tails: ``(S, K - 1, E)``, the inputs before each text; None for zeros or the last meta tokens.

    Returns:
        ``(M + T, E)``.
    """
    meta, lengths = documents.num_meta, documents.lengths
    if len(set(lengths)) == 1 and (tails is not None or len(lengths) == 1):
        # One text behind the meta tokens continues from them like a longer text.
        grid = _channels_last(x).view(len(lengths), -1, x.shape[1])
        initial = None if tails is None else tails.to(x.dtype).contiguous().mT
        return _convolve(grid.mT, weight, bias, initial_states=initial, activation="silu").mT.flatten(0, 1)

    # The kernels take either initial states or texts of different lengths: each text gets copies of its own inputs.
    copies = min(meta, weight.shape[1] - 1) if tails is None else weight.shape[1] - 1
    if tails is not None:
        x = torch.cat([tails.to(x.dtype).flatten(0, 1), x])
    rows, texts, places = _layout_with_copies(lengths, meta, copies, tails is not None, x.device)
    y = _convolve(x[rows].T[None], weight, bias, seq_idx=texts[None], activation="silu")
    return y[0].T[places]


@memoized
def _layout_with_copies(
    lengths: tuple[int, ...], meta: int, copies: int, has_tails: bool, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the layout in which every text has copies of the inputs before it in front.

    Args:
        lengths: The number of tokens of each text.
        meta: The number of meta tokens, the first rows.
        copies: The number of inputs before a text.
        has_tails: Whether the first rows are these inputs of each text, instead of meta tokens.
        device: The device of the result.

    Returns:
        The row of each input of this layout; its text, int32, where the meta tokens are a text; and the place of each
        meta token and token in the layout.
    """
    arange = partial(torch.arange, device="cpu")
    rows, places, row, place = [arange(meta)], [arange(meta)], meta, meta
    row += copies * len(lengths) if has_tails else 0
    for text, length in enumerate(lengths):
        before = copies * text if has_tails else meta - copies
        rows += [arange(before, before + copies), arange(row, row + length)]
        places.append(arange(place + copies, place + copies + length))
        row, place = row + length, place + copies + length
    sizes = torch.tensor([meta, *(copies + length for length in lengths)], device="cpu")
    texts = arange(len(sizes), dtype=torch.int32).repeat_interleave(sizes)
    on_device = (to_device(index, device) for index in (torch.cat(rows), texts, torch.cat(places)))
    return tuple(on_device)  # type: ignore[return-value]


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
    """Call the package with x ``(batch, E, T)``."""
    try:
        convolve = _function()
    except ImportError as error:
        raise RuntimeError(f"causal-conv1d cannot be used: {causal_conv1d_unavailable_reason()}") from error
    return convolve(x, weight, None if bias is None else bias.to(weight.dtype), **options)


@cache
def causal_conv1d_unavailable_reason() -> str | None:
    """Return why causal-conv1d cannot be used on this machine, or None if it can."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    try:
        _function()
    except ModuleNotFoundError as error:
        if error.name == "causal_conv1d":
            return "not installed (pip install 'hymba-tune[mamba]' as hymba-tune doctor says, or kernels)"
        return f"installed, but without its kernels ({error})"
    except Exception as error:  # a package built for another PyTorch raises any type of error
        return f"installed, but cannot be loaded: {error}"
    return None


def _function() -> Callable[..., Tensor]:
    """Return the function of the package, or else of the Hub kernel."""
    try:
        from causal_conv1d import causal_conv1d_fn
    except ModuleNotFoundError:
        if (kernel := hub_kernel("causal-conv1d")) is None:
            raise
        causal_conv1d_fn = kernel.causal_conv1d_fn
    return causal_conv1d_fn  # type: ignore[no-any-return]


def causal_conv1d_unsupported_reason(task: Task) -> str | None:
    """Return why the convolution of a task is not supported, or None if it is."""
    if task.taps not in WIDTHS:
        return f"it supports widths from {WIDTHS[0]} to {WIDTHS[-1]}, not {task.taps}"
    return None


def _channels_first(x: Tensor) -> Tensor:
    """Return ``(E, T)``: a view of x if the kernels can read it, else a copy."""
    # A single row counts as contiguous whatever its row stride, so `contiguous` would not copy it.
    return x.T if _is_readable(x) else x.T.clone(memory_format=torch.contiguous_format)


def _channels_last(x: Tensor) -> Tensor:
    """Return ``(T, E)``, copied if the kernels cannot read it."""
    return x if _is_readable(x) else x.clone(memory_format=torch.contiguous_format)


def _is_readable(x: Tensor) -> bool:
    """Return whether the kernels can read eight channels at a time from ``(T, E)``."""
    row_stride, channel_stride = x.stride()
    return channel_stride == 1 and row_stride % 8 == 0 and x.shape[1] % 8 == 0 and x.data_ptr() % 16 == 0

"""The convolution of the package causal-conv1d (github.com/Dao-AILab/causal-conv1d): CUDA kernels of Mamba's authors.

Glossary: T tokens, E channels, K width of the convolution.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from .backends import Task
from .hub_kernels import hub_kernel

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
    try:
        convolve = _function()
    except ImportError as error:
        raise RuntimeError(f"causal-conv1d cannot be used: {causal_conv1d_unavailable_reason()}") from error
    y: Tensor = convolve(_channels_first(x)[None], weight, None if bias is None else bias.to(weight.dtype))
    return y[0].T


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
    """Return ``(E, T)``: a view of x if the kernels can read eight channels at a time from it, else a copy."""
    row_stride, channel_stride = x.stride()
    readable = channel_stride == 1 and row_stride % 8 == 0 and x.shape[1] % 8 == 0 and x.data_ptr() % 16 == 0
    # A single row counts as contiguous whatever its row stride, so `contiguous` would not copy it.
    return x.T if readable else x.T.clone(memory_format=torch.contiguous_format)

"""Contexts and conversions that keep autocast from lowering the precision of matrix products inside a kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.amp import is_autocast_available

P = ParamSpec("P")
R = TypeVar("R")


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """Return a context in which operations on this type of device compute in the dtypes of their inputs."""
    return torch.autocast(device, enabled=False) if autocast_is_on(device) else nullcontext()


def outside_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function compute in the dtypes of its arguments, whether or not autocast is on where it is called.

    Autocast is disabled for the device of the first tensor among the positional arguments and the tuples in them.
    """

    @wraps(function)
    def computed(*arguments: P.args, **named: P.kwargs) -> R:
        first = next(_tensors(arguments), None)
        with nullcontext() if first is None else without_autocast(first.device.type):
            return function(*arguments, **named)

    return computed


def to_autocast_dtype(tensor: Tensor) -> Tensor:
    """Return the tensor in the dtype of a matrix product: the autocast dtype where autocast is on, else its own."""
    device = tensor.device.type
    if tensor.dtype is torch.float64 or not autocast_is_on(device):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return the tensor in float32, or unchanged if its dtype is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def autocast_is_on(device: str) -> bool:
    """Return whether autocast is on for this type of device."""
    return is_autocast_available(device) and torch.is_autocast_enabled(device)


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from _tensors(value)

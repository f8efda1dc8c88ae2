"""Results that all layers of a pass share."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def memoized(function: Callable[P, R]) -> Callable[P, R]:
    """Cache the last results of a function, since every layer needs the masks and borders of the same few layouts.

    The function runs outside inference mode, so that training can use tensors that were first made by generation.
    """
    cached: Any = lru_cache(maxsize=64)(torch.inference_mode(False)(function))
    _CACHE_CLEARS.append(cached.cache_clear)
    memoized_function: Callable[P, R] = cached
    return memoized_function


_CACHE_CLEARS: list[Callable[[], None]] = []


def forget_kept() -> None:
    """Clear the caches of all `memoized` functions, for example after they were called with fake tensors."""
    for clear in _CACHE_CLEARS:
        clear()

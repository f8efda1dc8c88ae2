"""Computing on tensors without memory, and counting the bytes that they would need."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hymba_tune.model import use_kernels
from hymba_tune.model.backends import AUTO, OPERATIONS
from hymba_tune.model.memoized import forget_kept


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors created while it is active, for as long as each lives.

    Attributes:
        live: The bytes of living tensors.
        peak: The largest value of ``live`` so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._storages: dict[int, Any] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        results = func(*args, **(kwargs or {}))
        inputs = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for result in tree_leaves(results):
            if isinstance(result, Tensor) and result.untyped_storage()._cdata not in inputs:
                self._count(result.untyped_storage())
        return results

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()

        def release(_: Any) -> None:
            self.live -= size
            del self._storages[key]

        self._storages[key] = weakref.ref(storage, release)
        self.live += size
        self.peak = max(self.peak, self.live)


@contextmanager
def without_memory(dtype: torch.dtype, *, own_kernels: bool) -> Iterator[None]:
    """Make all tensors created within the block fake CPU tensors, which have shapes but need no memory or time.

    Args:
        dtype: The dtype of autocast, as in training; float32 disables autocast.
        own_kernels: Whether to use the kernels chosen for this process. Otherwise the fastest CPU kernels are used,
            also on a machine without a compiler, as they keep the same tensors for the backward as a GPU's.
    """
    forget_kept()
    # float16 needs as many bytes as bfloat16, and CPU kernels support only the latter.
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype is not torch.float32)
    try:
        with nullcontext() if own_kernels else _fastest_kernels(), FakeTensorMode(), autocast:
            yield
    finally:
        forget_kept()


@contextmanager
def _fastest_kernels() -> Iterator[None]:
    """Use the fastest CPU kernels, even those that this machine cannot compile: fake tensors give them no work."""
    before = use_kernels(**dict.fromkeys(OPERATIONS, AUTO))
    backends = {operation: operation.backends for operation in OPERATIONS.values()}
    for operation, own in backends.items():
        if native := own.get("native"):
            operation.backends = own | {"native": replace(native, unavailable_reason=lambda: None)}
    try:
        yield
    finally:
        for operation, own in backends.items():
            operation.backends = own
        use_kernels(**before)


def fake_parameters(module: nn.Module) -> dict[str, Tensor]:
    """Return fake copies of a module's parameters for `torch.func.functional_call`; call it in `without_memory`."""
    return {
        name: torch.empty(parameter.shape, dtype=parameter.dtype, requires_grad=parameter.requires_grad)
        for name, parameter in module.named_parameters()
    }

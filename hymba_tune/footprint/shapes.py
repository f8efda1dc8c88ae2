"""Computing on tensors without memory, and counting the bytes that they would take."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hymba_tune.model import use_kernels
from hymba_tune.model.backends import AUTO, OPERATIONS, forget_kept


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are made while it is on, for as long as each lives.

    Attributes:
        live: Bytes now.
        peak: The most there were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._storages: dict[int, Any] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        results = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for result in tree_leaves(results):
            if isinstance(result, Tensor) and result.untyped_storage()._cdata not in given:
                self._count(result.untyped_storage())
        return results

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()

        def gone(_: Any) -> None:
            self.live -= size
            del self._storages[key]

        self._storages[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)


@contextmanager
def without_memory(dtype: torch.dtype, *, own_kernels: bool) -> Iterator[None]:
    """Let all tensors made here be fake ones of the CPU: they have shapes, and take neither memory nor time.

    Args:
        dtype: What autocast computes in, as training does; float32 for no autocast.
        own_kernels: Compute in the ways chosen for this process. Otherwise in the fastest of a CPU, which keep for the
            backward what those of a GPU do.
    """
    before = {} if own_kernels else use_kernels(**dict.fromkeys(OPERATIONS, AUTO))
    forget_kept()
    # float16 takes what bfloat16 does, and a CPU's kernels know only the latter.
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype is not torch.float32)
    try:
        with FakeTensorMode(), autocast:
            yield
    finally:
        forget_kept()
        use_kernels(**before)


def fake_parameters(module: nn.Module) -> dict[str, Tensor]:
    """Parameters such as the module's, for `torch.func.functional_call`, to be made where nothing takes memory."""
    return {
        name: torch.empty(parameter.shape, dtype=parameter.dtype, requires_grad=parameter.requires_grad)
        for name, parameter in module.named_parameters()
    }

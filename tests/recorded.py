"""CUDA graphs on a CPU: the operators of a step are recorded and replayed on the same memory, without its Python."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hymba_tune.model.backends import Operation

WAITS = ("_local_scalar_dense", "nonzero", "_unique2", "equal", "masked_select", "lift_fresh", "is_nonzero")
"""Operators that wait for the device, or copy from memory of the CPU that is not there at a replay."""


class Graph(TorchDispatchMode):
    """Records operators; an operator that waits for the device is an error.

    Attributes:
        calls: Each operator with its arguments and what it returned.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with self:  # inference mode leaves composite operators whole
            parts = func.decompose(*args, **kwargs or {})
        if parts is not NotImplemented:
            return parts
        name = func._schema.name.partition("::")[2]
        indices = tree_leaves(args[1]) if name.startswith("index") else []
        if name in WAITS or any(isinstance(x, Tensor) and x.dtype == torch.bool for x in indices):
            raise AssertionError(f"{name} waits for the device")
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.is_write:
                storage = value.untyped_storage()
                self._before.setdefault(storage.data_ptr(), (storage, storage.clone()))
        result = func(*args, **kwargs or {})
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def undo(self) -> None:
        """Undo all changes: a device computes nothing while a graph is captured."""
        for storage, before in self._before.values():
            storage.copy_(before)

    def replay(self) -> None:
        """Run the operators again, and write what they return to where they returned it first."""
        for func, args, kwargs, result in self.calls:
            inputs = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.untyped_storage().data_ptr() not in inputs:
                    old.copy_(new)

    @property
    def allocated(self) -> list[Tensor]:
        """The tensors that the operators returned in memory of their own."""
        found = []
        for _, args, kwargs, result in self.calls:
            inputs = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
            leaves = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
            found += [x for x in leaves if x.untyped_storage().data_ptr() not in inputs]
        return found


class _Stream:
    def wait_stream(self, _: Any) -> None:
        """Do nothing: a CPU has one stream."""


def recorded_graphs(patch: pytest.MonkeyPatch) -> list[Graph]:
    """Replace CUDA graphs by recordings of operators in plain torch, and return the list of those that are captured."""
    # Native kernels are no operators; verbs choose among all.
    patch.setattr(Operation, "choose", lambda operation, *_, **__: operation._plain)
    for room in ("generate.opening", "train.setup"):
        patch.setattr(f"hymba_tune.{room}.check_cuda_graphs", lambda _: None)
    graphs: list[Graph] = []

    def make() -> Graph:
        graphs.append(Graph())
        return graphs[-1]

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("tolist waits for the device")

    @contextmanager
    def capture(graph: Graph, *_: Any, **__: Any) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as inside, graph:
            inside.setattr(Tensor, "tolist", refuse)
            inside.setattr(Tensor, "cpu", refuse)
            yield
        graph.undo()

    patch.setattr(torch.cuda, "Stream", _Stream)
    patch.setattr(torch.cuda, "current_stream", _Stream)
    patch.setattr(torch.cuda, "set_stream", lambda _: None)
    patch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    patch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    patch.setattr(torch.cuda, "CUDAGraph", make)
    patch.setattr(torch.cuda, "graph", capture)
    return graphs

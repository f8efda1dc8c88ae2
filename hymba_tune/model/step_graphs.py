"""Steps of generation as CUDA graphs: the GPU replays their kernels without waiting for Python."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor


class CaptureError(RuntimeError):
    """A step cannot be captured as a CUDA graph."""


class StepGraphs:
    """CUDA graphs of steps that read and write tensors at fixed addresses.

    The first step of a kind runs as usual, on the stream of the graphs, which loads and compiles its kernels. The
    second one is captured, and replayed from then on. All graphs share one pool of memory.
    """

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None
        self._warm: set[Hashable] = set()
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def run(self, kind: Hashable, step: Callable[[], Tensor]) -> Tensor:
        """Run a step.

        Args:
            kind: Two steps of one kind differ only in the contents of the tensors that they read.
            step: Computes the step; it may not wait for the device.

        Returns:
            The step's result, which the next step may overwrite.

        Raises:
            CaptureError: If the step cannot be captured.
        """
        if kind not in self._warm:
            self._warm.add(kind)
            return self._warm_up(step)
        if kind not in self._graphs:
            self._graphs[kind] = self._capture(step)
        graph, result = self._graphs[kind]
        graph.replay()
        return result

    def clear(self) -> None:
        """Forget all graphs, because tensors have moved."""
        self._graphs.clear()
        self._warm.clear()
        self._pool = None  # which ends with its last graph

    def _warm_up(self, step: Callable[[], Tensor]) -> Tensor:
        self._stream = self._stream or torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream), _UncachedAutocast():
            result = step()
        torch.cuda.current_stream().wait_stream(self._stream)
        return result

    def _capture(self, step: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream()
        try:
            # Another thread of a server may use the device meanwhile.
            with (
                _UncachedAutocast(),
                torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"),
            ):
                result = step()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # kernels of other packages raise any type of error
            # Ending a capture that has failed raises another error, and leaves its stream the current one.
            torch.cuda.set_stream(stream)
            reason = error.__context__ or error
            raise CaptureError(str(reason).strip().partition("\n")[0]) from error
        return graph, result


class _UncachedAutocast:
    """No cached casts of weights under autocast: a graph would go on reading a cast of weights that have changed."""

    def __enter__(self) -> None:
        self._enabled = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)

    def __exit__(self, *_: object) -> None:
        torch.set_autocast_cache_enabled(self._enabled)

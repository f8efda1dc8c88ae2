"""The self-test of a backend: its results and gradients of a small problem, compared with those of a plain backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .autocast import without_autocast

if TYPE_CHECKING:
    from .backends import Backend, Problem, Task


def failure(problem: Callable[[], Problem], backend: Backend, plain: Backend, task: Task) -> str | None:
    """Compute a small problem with and without autocast, and return why a backend failed, or None if it passed.

    Args:
        problem: A function that makes the problem.
        backend: The backend to test.
        plain: The backend to compare with.
        task: The task that the problem is an instance of.
    """
    with torch.enable_grad():
        with without_autocast(task.device):
            small = problem()
            expected = _results(small, plain, task)

        for autocast in (False, True):
            context = " under autocast" if autocast else ""
            # Correct backends differ by rounding only; the error of a wrong kernel is larger than this.
            tolerance = 1e-3 if task.dtype.itemsize >= torch.float32.itemsize and not autocast else 5e-2
            try:
                with torch.autocast(task.device, enabled=autocast):
                    actual = _results(small, backend, task)
            except torch.OutOfMemoryError:  # says nothing about the backend
                raise
            except Exception as error:  # compilers and other packages raise any type of error
                return f"it failed on a small problem{context}: {type(error).__name__}: {first_line(error)}"
            error_size = max(_relative_error(*pair) for pair in zip(actual, expected, strict=True))
            if error_size > tolerance:
                return f"its results{context} have a relative error of {error_size:.1e}, above {tolerance:.0e}"
    return None


def first_line(error: Exception) -> str:
    """Return the first line of the message of an error."""
    return str(error).strip().partition("\n")[0]


def _results(problem: Problem, backend: Backend, task: Task) -> list[Tensor]:
    """Return the outputs, and the gradients of their weighted sum if the task needs gradients."""
    outputs = problem.compute(backend)
    if not task.gradients:
        return list(outputs)
    weights = [torch.linspace(-1, 1, x.numel(), device=x.device).view_as(x).to(x.dtype) for x in outputs]
    return [*outputs, *torch.autograd.grad(outputs, problem.leaves, weights)]


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the relative error; NaN counts as infinity."""
    actual = actual.detach().double()
    expected = expected.detach().double()
    error = ((actual - expected).norm() / expected.norm().clamp(min=1e-9)).item()
    return error if error == error else float("inf")

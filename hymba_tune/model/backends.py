"""Several ways to compute one operation: what each can do, which one is taken, and why not another."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from .autocast import outside_autocast, without_autocast

logger = logging.getLogger(__name__)
P = ParamSpec("P")
R = TypeVar("R")

AUTO = "auto"
GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What kernels for GPUs take: everything but float64."""


@dataclass(frozen=True)
class Task:
    """What a backend has to compute.

    Attributes:
        device: Type of the device, such as "cpu".
        dtype: The dtype of the inputs.
        gradients: Whether a backward may come.
        has_initial_state: Whether texts go on from what a cache holds.
        widths: Of a query head and of a value head, for attention.
        taps: Width of the convolution.
    """

    device: str
    dtype: torch.dtype
    gradients: bool = True
    has_initial_state: bool = False
    widths: tuple[int, int] = (64, 128)
    taps: int = 4

    @classmethod
    def of(cls, *tensors: Tensor | None, **more: Any) -> Task:
        """The task of computing with these tensors, the first of which is never None."""
        first = tensors[0]
        assert first is not None
        gradients = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
        return cls(first.device.type, first.dtype, gradients, **more)


def _nothing() -> None:
    return None


def _fits(_: Task) -> None:
    return None


@dataclass(frozen=True)
class Backend:
    """One way to compute an operation, with what it declares to be able to do.

    Attributes:
        name: What it is called in settings.
        run: The function; its arguments are the operation's. Where an operation is several functions, all of them.
            Each computes outside autocast, in the dtypes of its inputs.
        devices: Types of devices it runs on; None for any.
        dtypes: The dtypes of the inputs that it takes; None for any.
        gradients: Whether it has a backward.
        initial_state: Whether texts can begin from a given state; if not, each gets meta tokens of its own in front.
        fuses_meta_prefix: Whether it takes, at once, texts of which all but the first go on from where that one ends.
        needs_self_test: Whether it is compiled at run time or comes from another package. It is then tried on a small
            problem first, so that one that does not compile, or computes something else, is never trusted with a run.
        unavailable_reason: Why it cannot be used on this machine and what to install, or None if it can.
        unsupported_reason: Why it cannot take a task, for reasons not among the above, or None if it can.
    """

    name: str
    run: Any
    devices: tuple[str, ...] | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    gradients: bool = True
    initial_state: bool = True
    fuses_meta_prefix: bool = False
    needs_self_test: bool = False
    unavailable_reason: Callable[[], str | None] = _nothing
    unsupported_reason: Callable[[Task], str | None] = _fits

    def __post_init__(self) -> None:
        run: Any = self.run
        kind: Any = type(run)  # several functions are a NamedTuple
        run = kind(*map(outside_autocast, run)) if issubclass(kind, tuple) else outside_autocast(run)
        object.__setattr__(self, "run", run)

    def obstacle(self, task: Task) -> str | None:
        """Why it cannot take a task, or None if it can."""
        if self.devices is not None and task.device not in self.devices:
            return f"it runs on {_joined(self.devices)}, not on {task.device}"
        if self.dtypes is not None and task.dtype not in self.dtypes:
            return f"it takes {_joined(map(_short, self.dtypes))}, not {_short(task.dtype)}"
        if task.gradients and not self.gradients:
            return "it has no backward"
        if task.has_initial_state and not self.initial_state:
            return "it cannot go on from a state"
        return self.unavailable_reason() or self.unsupported_reason(task)


@dataclass(frozen=True)
class Problem:
    """A small instance of an operation: how a backend computes it, and from which tensors."""

    compute: Callable[[Backend], tuple[Tensor, ...]]
    leaves: list[Tensor]


def random_leaves(task: Task, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Normal random tensors of these shapes, always the same ones, for a small problem of a task."""
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(shape, generator=generator).to(task.device, task.dtype) for shape in shapes]
    return [leaf.requires_grad_(task.gradients) for leaf in leaves]


OPERATIONS: dict[str, Operation] = {}
"""Every operation that has backends, by name."""


class Operation:
    """An operation and its backends.

    Args:
        name: What it is called in settings.
        backends: The fastest first. The one called ``plain`` is what the others are compared with.
        plain: A backend that can do everything.
        problem: Makes a small problem for a task.
    """

    def __init__(self, name: str, backends: list[Backend], *, plain: str, problem: Callable[[Task], Problem]) -> None:
        self.backends = {backend.name: backend for backend in backends}
        self.name = name
        self.chosen = AUTO
        self._plain = self.backends[plain]
        self._problem = problem
        self._trials: dict[tuple[str, Task], str | None] = {}
        OPERATIONS[name] = self

    def choose(self, task: Task, name: str | None = None) -> Backend:
        """The backend that takes a task.

        Args:
            task: What is to be computed.
            name: A backend, or "auto" for the fastest that can; what `use_kernels` chose when not given.

        Raises:
            ValueError: If there is no backend of this name, or it cannot take the task; the message says which can.
        """
        name = name or self._standing(task)
        if name == AUTO:
            return next(backend for backend in self.backends.values() if self._obstacle(backend, task) is None)
        self.check(name)
        if reason := self._obstacle(self.backends[name], task):
            able = [other for other, why in self.obstacles(task).items() if why is None]
            raise ValueError(f"the {self.name} backend {name} cannot be used: {reason}; {_joined(able)} can")
        return self.backends[name]

    def compute(self, task: Task, *arguments: Any, name: str | None = None) -> Any:
        """What the backend that takes the task makes of the arguments.

        One that was not chosen by name and fails after all, where the small problem went well, is left out from
        then on, and another computes.

        Args:
            task: What is to be computed.
            *arguments: The backend's.
            name: As for `choose`.
        """
        backend = self.choose(task, name)
        if not backend.needs_self_test or (name or self._standing(task)) != AUTO:
            return backend.run(*arguments)
        try:
            return backend.run(*arguments)
        except torch.OutOfMemoryError:  # another way would take no less
            raise
        except Exception as error:  # compilers and foreign packages raise anything
            self._leave_out(backend, task, f"it failed: {type(error).__name__}: {_first_line(error)}")
            return self.compute(task, *arguments, name=name)

    def _leave_out(self, backend: Backend, task: Task, reason: str) -> None:
        self._trials[backend.name, task] = reason
        logger.warning("The %s backend %s is left out: %s", self.name, backend.name, reason)

    def _standing(self, task: Task) -> str:
        """What `use_kernels` chose; where that cannot go on from a cache, generation takes the fastest that can."""
        chosen = self.backends.get(self.chosen)
        return AUTO if chosen and task.has_initial_state and not chosen.initial_state else self.chosen

    def check(self, name: str) -> None:
        """Refuse a name that no backend has.

        Raises:
            ValueError: Listing the names there are.
        """
        if name not in (AUTO, *self.backends):
            raise ValueError(f"{self.name} backend {name!r}; expected one of {', '.join((AUTO, *self.backends))}")

    def obstacles(self, task: Task) -> dict[str, str | None]:
        """For each backend why it cannot take the task, or None if it can; the fastest first."""
        return {name: self._obstacle(backend, task) for name, backend in self.backends.items()}

    def _obstacle(self, backend: Backend, task: Task) -> str | None:
        if reason := backend.obstacle(task):
            return reason
        if not backend.needs_self_test:
            return None
        key = backend.name, task
        if key not in self._trials:
            if reason := self._try(backend, task):
                self._leave_out(backend, task, reason)
            else:
                self._trials[key] = None
        return self._trials[key]

    def _try(self, backend: Backend, task: Task) -> str | None:
        """What goes wrong when a small problem is computed, or None."""
        with torch.enable_grad():
            with without_autocast(task.device):
                problem = self._problem(task)
                expected = _results(problem, self._plain, task)
            for narrowing in (False, True):
                where = " under autocast" if narrowing else ""
                # Rounding of two ways to compute the same; a wrong kernel is off by more than all of it.
                allowed = 1e-3 if task.dtype.itemsize >= torch.float32.itemsize and not narrowing else 5e-2
                try:
                    with torch.autocast(task.device, enabled=narrowing):
                        actual = _results(problem, backend, task)
                except Exception as error:  # compilers and foreign packages raise anything
                    return f"it failed on a small problem{where}: {type(error).__name__}: {_first_line(error)}"
                furthest = max(_relative_error(*pair) for pair in zip(actual, expected, strict=True))
                if furthest > allowed:
                    return f"its results{where} are off by {furthest:.1e}; {allowed:.0e} is allowed"
        return None


def use_kernels(**choices: str) -> dict[str, str]:
    """Choose backends for this process: ``use_kernels(scan="torch", attention="auto")``.

    Args:
        **choices: By operation (scan, conv, attention) a backend's name, or "auto" for the fastest that can.

    Returns:
        What was chosen before, to be given back to this function.

    Raises:
        ValueError: If there is no such operation or backend.
    """
    for operation, name in choices.items():
        if operation not in OPERATIONS:
            raise ValueError(f"{operation!r} has no kernels to choose; expected one of {', '.join(OPERATIONS)}")
        OPERATIONS[operation].check(name)
    before = {operation: OPERATIONS[operation].chosen for operation in choices}
    for operation, name in choices.items():
        OPERATIONS[operation].chosen = name
    return before


@dataclass(frozen=True)
class Choice:
    """What became of an operation's backends.

    Attributes:
        taken: The one that computes.
        usable: The others that could, the fastest first.
        obstacles: Why the rest cannot, by name.
    """

    taken: str
    usable: list[str]
    obstacles: dict[str, str]


def survey(task: Task) -> dict[str, Choice]:
    """What is taken for a task and why not another, by operation.

    Raises:
        ValueError: If a backend that `use_kernels` chose cannot take the task.
    """
    found = {}
    for name, operation in OPERATIONS.items():
        taken, obstacles = operation.choose(task).name, operation.obstacles(task)
        usable = [other for other, why in obstacles.items() if why is None and other != taken]
        found[name] = Choice(taken, usable, {other: why for other, why in obstacles.items() if why is not None})
    return found


def kept(function: Callable[P, R]) -> Callable[P, R]:
    """Keep a function's last results: every layer asks for the masks and borders of the same few layouts.

    They are ordinary tensors also where generation makes them first: training may use them.
    """
    keeping: Any = lru_cache(maxsize=64)(torch.inference_mode(False)(function))
    _KEPT.append(keeping.cache_clear)
    kept_function: Callable[P, R] = keeping
    return kept_function


_KEPT: list[Callable[[], None]] = []


def forget_kept() -> None:
    """Forget all that is `kept`, such as what was made of tensors without memory."""
    for forget in _KEPT:
        forget()


def _results(problem: Problem, backend: Backend, task: Task) -> list[Tensor]:
    """The outputs, and the gradients of their weighed sum if the task asks for gradients."""
    outputs = problem.compute(backend)
    if not task.gradients:
        return list(outputs)
    weights = [torch.linspace(-1, 1, x.numel(), device=x.device).view_as(x).to(x.dtype) for x in outputs]
    return [*outputs, *torch.autograd.grad(outputs, problem.leaves, weights)]


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    """NaN counts as infinitely far."""
    actual, expected = actual.detach().double(), expected.detach().double()
    error = ((actual - expected).norm() / expected.norm().clamp(min=1e-9)).item()
    return error if error == error else float("inf")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _joined(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last

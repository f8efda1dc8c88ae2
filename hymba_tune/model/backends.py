"""The backends of an operation: what each one supports, which one is selected, and why others are not."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from .autocast import outside_autocast
from .self_test import failure, first_line

logger = logging.getLogger(__name__)
R = TypeVar("R")

AUTO = "auto"
GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes that GPU kernels support: all but float64."""


@dataclass(frozen=True)
class Task:
    """The computation that a backend is selected for.

    Attributes:
        device: The type of the device, such as "cpu".
        dtype: The dtype of the inputs.
        gradients: Whether a backward may follow.
        has_initial_state: Whether texts continue from a cached state.
        heads: The numbers of query heads and of key heads, for attention.
        widths: The widths of a query head and of a value head, for attention.
        taps: The width of the convolution.
        sizes: The sizes of the model, for the operations of one new token of each text.
    """

    device: str
    dtype: torch.dtype
    gradients: bool = True
    has_initial_state: bool = False
    heads: tuple[int, int] = (25, 5)
    widths: tuple[int, int] = (64, 128)
    taps: int = 4
    sizes: tuple[int, ...] = ()

    @classmethod
    def of(cls, *tensors: Tensor | None, **options: Any) -> Task:
        """Return the task for these tensors, the first of which must not be None."""
        first = tensors[0]
        assert first is not None
        gradients = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
        return _task(first.device.type, first.dtype, gradients, **options)


# Every layer asks for the same few tasks, and making one takes longer than finding it.
_task = lru_cache(maxsize=256)(Task)


def _always_available() -> None:
    return None


def _no_reason(_: Task) -> None:
    return None


@dataclass(frozen=True)
class Backend:
    """One implementation of an operation, and what it supports.

    Attributes:
        name: The name of the backend in settings.
        run: The function of the operation, or a named tuple of its functions. Each function computes outside autocast,
            in the dtypes of its inputs.
        devices: The device types that it runs on; None for any.
        dtypes: The input dtypes that it supports; None for any.
        gradients: Whether it has a backward.
        initial_state: Whether texts can start from a given state. If not, each text gets its own copy of the meta
            tokens.
        fuses_meta_prefix: Whether one call can process the meta tokens and the texts that continue from them.
        slow_start: Whether the first call takes many seconds, as for `torch.compile`. Where no gradients are asked, as
            before the first token of an answer, other backends are preferred.
        needs_self_test: Whether it is compiled at run time or comes from another package. Such a backend first has to
            solve a small problem, so that no run uses one that fails to compile or returns wrong results.
        unavailable_reason: A function that returns why the backend cannot be used on this machine and what to install,
            or None if it can.
        unsupported_reason: A function that returns why the backend cannot compute a task, for reasons that the fields
            above do not cover, or None if it can.
        slower_reason: A function that returns why another backend computes a task faster, or None. It matters only
            where the user has not chosen one.
    """

    name: str
    run: Any
    devices: tuple[str, ...] | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    gradients: bool = True
    initial_state: bool = True
    fuses_meta_prefix: bool = False
    slow_start: bool = False
    needs_self_test: bool = False
    unavailable_reason: Callable[[], str | None] = _always_available
    unsupported_reason: Callable[[Task], str | None] = _no_reason
    slower_reason: Callable[[Task], str | None] = _no_reason

    def __post_init__(self) -> None:
        run: Any = self.run
        run_type: Any = type(run)
        run = run_type(*map(outside_autocast, run)) if issubclass(run_type, tuple) else outside_autocast(run)
        object.__setattr__(self, "run", run)

    def obstacle(self, task: Task) -> str | None:
        """Return why the backend cannot compute a task, or None if it can."""
        if self.devices is not None and task.device not in self.devices:
            return f"it runs on {_joined(self.devices)}, not on {task.device}"
        if self.dtypes is not None and task.dtype not in self.dtypes:
            return f"it supports {_joined(map(_short, self.dtypes))}, not {_short(task.dtype)}"
        if task.gradients and not self.gradients:
            return "it has no backward"
        if task.has_initial_state and not self.initial_state:
            return "it cannot continue from an initial state"
        return self.unsupported_reason(task) or self.unavailable_reason()  # the latter may compile


@dataclass(frozen=True)
class Problem:
    """A small instance of an operation, for the self-test of a backend.

    Attributes:
        compute: A function that returns the outputs of a backend.
        leaves: The input tensors, for the gradients.
    """

    compute: Callable[[Backend], tuple[Tensor, ...]]
    leaves: list[Tensor]


def random_leaves(task: Task, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Return normally distributed tensors of these shapes for a small problem; every call returns the same ones."""
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(shape, generator=generator).to(task.device, task.dtype) for shape in shapes]
    return [leaf.requires_grad_(task.gradients) for leaf in leaves]


OPERATIONS: dict[str, Operation] = {}
"""Every operation that has backends, by name."""


class Operation:
    """An operation and its backends.

    Args:
        name: The name of the operation in settings.
        backends: The backends of the operation, the fastest first.
        plain: The name of a backend that supports every task; self-tests compare the others with it.
        problem: A function that makes a small problem for a task.
        trains: Whether training uses the operation. If not, a backend is asked for no gradients.
    """

    def __init__(
        self,
        name: str,
        backends: list[Backend],
        *,
        plain: str,
        problem: Callable[[Task], Problem],
        trains: bool = True,
    ) -> None:
        self.name = name
        self.backends = {backend.name: backend for backend in backends}
        self.chosen = AUTO
        self._plain = self.backends[plain]
        self._problem = problem
        self._trains = trains
        self._self_tests: dict[tuple[str, Task], str | None] = {}
        # Every layer of every step asks for the same few choices, each of which takes longer than a launch on a GPU.
        self._choices: dict[tuple[Task, str], Backend] = {}
        self._chosen_from: tuple[Backend, ...] = ()
        OPERATIONS[name] = self

    def choose(self, task: Task, name: str | None = None) -> Backend:
        """Return the backend for a task.

        Args:
            task: The task to compute.
            name: The name of a backend, or "auto" for the fastest usable one. The default is the choice of
                `use_kernels`.

        Raises:
            ValueError: If no backend has this name, or it cannot compute the task; the message lists those that can.
        """
        name = name or self._default_name(task)
        present = tuple(self.backends.values())
        if present != self._chosen_from:
            self._choices, self._chosen_from = {}, present
        if (key := (task, name)) not in self._choices:
            self._choices[key] = self._choose(task, name)
        return self._choices[key]

    def _choose(self, task: Task, name: str) -> Backend:
        if name == AUTO:
            obstacles = ((backend, self._reason_against(backend, task)) for backend in self._by_preference(task))
            return next(backend for backend, reason in obstacles if reason is None)
        self.check(name)
        if reason := self._obstacle(self.backends[name], task):
            usable = [other for other, obstacle in self.obstacles(task).items() if obstacle is None]
            raise ValueError(f"the {self.name} backend {name} cannot be used: {reason}; {_joined(usable)} can")
        return self.backends[name]

    def compute(self, task: Task, *arguments: Any, name: str | None = None, function: str | None = None) -> Any:
        """Compute a task with its backend, or with another one if it fails; see `attempt`.

        Args:
            task: The task to compute.
            *arguments: The arguments of the backend.
            name: The name of a backend; see `choose`.
            function: The name of the function, of a backend that has several.
        """

        def run(backend: Backend) -> Any:
            return (backend.run if function is None else getattr(backend.run, function))(*arguments)

        return self.attempt(task, run, name=name)

    def attempt(self, task: Task, run: Callable[[Backend], R], *, name: str | None = None) -> R:
        """Compute a task by a function of its backend.

        If a backend passed its self-test but fails here, and was not chosen by name, it is excluded from now on and
        another backend computes the task. An error after which the device computes nothing, as after an illegal access
        of memory, is raised.

        Args:
            task: The task to compute.
            run: The function, which is called with the backend.
            name: The name of a backend; see `choose`.
        """
        backend = self.choose(task, name)
        if not backend.needs_self_test or (name or self._default_name(task)) != AUTO:
            return run(backend)
        try:
            return run(backend)
        except torch.OutOfMemoryError:  # another backend would need no less memory
            raise
        except Exception as error:  # compilers and other packages raise any type of error
            if not _computes(task.device):
                raise
            self._exclude(backend, task, f"it failed: {type(error).__name__}: {first_line(error)}")
            return self.attempt(task, run, name=name)

    def _exclude(self, backend: Backend, task: Task, reason: str) -> None:
        self._self_tests[backend.name, task] = reason
        self._choices.clear()
        logger.warning("The %s backend %s is not used: %s", self.name, backend.name, reason)

    def _default_name(self, task: Task) -> str:
        """Return the choice of `use_kernels`, or "auto" for a task whose cached state that backend cannot use."""
        chosen = self.backends.get(self.chosen)
        return AUTO if chosen and task.has_initial_state and not chosen.initial_state else self.chosen

    def check(self, name: str) -> None:
        """Check that a backend has this name.

        Raises:
            ValueError: If none has; the message lists the valid names.
        """
        if name not in (AUTO, *self.backends):
            raise ValueError(f"{self.name} backend {name!r}; expected one of {', '.join((AUTO, *self.backends))}")

    def obstacles(self, task: Task) -> dict[str, str | None]:
        """Return for each backend, the preferred one first, why it cannot compute the task, or None if it can."""
        return {backend.name: self._reason_against(backend, task) for backend in self._by_preference(task)}

    def _by_preference(self, task: Task) -> list[Backend]:
        return sorted(self.backends.values(), key=lambda backend: backend.slow_start and not task.gradients)

    def _reason_against(self, backend: Backend, task: Task) -> str | None:
        return backend.slower_reason(task) or self._obstacle(backend, task)

    def _obstacle(self, backend: Backend, task: Task) -> str | None:
        if task.gradients and not self._trains:
            task = replace(task, gradients=False)
        if reason := backend.obstacle(task):
            return reason
        if not backend.needs_self_test:
            return None
        key = backend.name, task
        if key not in self._self_tests:
            if reason := self._self_test(backend, task):
                self._exclude(backend, task, reason)
            else:
                self._self_tests[key] = None
        return self._self_tests[key]

    @property
    def plain(self) -> str:
        """The name of the backend that supports every task."""
        return self._plain.name

    @property
    def tested(self) -> list[Backend]:
        """The backends that training uses after they passed a self-test."""
        passed = [key for key, reason in self._self_tests.items() if reason is None]
        tasks = [task for name, task in passed if task.gradients and self.chosen in (AUTO, name)]
        used = {backend.name: backend for backend in map(self.choose, tasks) if backend.needs_self_test}
        return [*used.values()]

    def _self_test(self, backend: Backend, task: Task) -> str | None:
        """Compute a small problem, and return why the backend failed, or None if it passed."""
        if not self._trains:
            task = replace(task, gradients=False)
        return failure(lambda: self._problem(task), backend, self._plain, task)


def use_kernels(**choices: str) -> dict[str, str]:
    """Choose backends for this process: ``use_kernels(scan="torch", attention="auto")``.

    Args:
        **choices: For each operation, such as scan, the name of a backend, or "auto" for the fastest usable one.

    Returns:
        The previous choices; pass them to this function to restore them.

    Raises:
        ValueError: If an operation or a backend does not exist.
    """
    for operation, name in choices.items():
        if operation not in OPERATIONS:
            raise ValueError(f"{operation!r} has no kernels to choose; expected one of {', '.join(OPERATIONS)}")
        OPERATIONS[operation].check(name)
    previous = {operation: OPERATIONS[operation].chosen for operation in choices}
    for operation, name in choices.items():
        OPERATIONS[operation].chosen = name
    return previous


@dataclass(frozen=True)
class Choice:
    """The backends of an operation, by whether they are selected, usable or unusable.

    Attributes:
        taken: The name of the selected backend.
        usable: The names of the other usable backends, the fastest first.
        obstacles: The names of the unusable backends, and why they are unusable.
    """

    taken: str
    usable: list[str]
    obstacles: dict[str, str]


def survey(task: Task) -> dict[str, Choice]:
    """Return the selected, usable and unusable backends of each operation for a task.

    Raises:
        ValueError: If a backend that `use_kernels` chose cannot compute the task.
    """
    choices = {}
    for name, operation in OPERATIONS.items():
        selected = operation.choose(task).name
        obstacles = operation.obstacles(task)
        usable = [other for other, reason in obstacles.items() if reason is None and other != selected]
        unusable = {other: reason for other, reason in obstacles.items() if reason is not None}
        choices[name] = Choice(selected, usable, unusable)
    return choices


def _computes(device: str) -> bool:
    """Return whether a device can still be used after a kernel failed on it."""
    if device != "cuda":
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _joined(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last

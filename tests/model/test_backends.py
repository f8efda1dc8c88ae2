"""Which backend takes a task, what is said of the others, and what happens to one that does not work."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from hymba_tune.model import backends, use_kernels
from hymba_tune.model.backends import OPERATIONS, Backend, Operation, Problem, Task, survey
from hymba_tune.model.scan import SCAN

CPU = Task("cpu", torch.float32)


def double(x: Tensor) -> Tensor:
    return 2 * x


def small_problem(task: Task) -> Problem:
    leaf = torch.ones(3, dtype=task.dtype, requires_grad=task.gradients)
    return Problem(lambda backend: (backend.run(leaf),), [leaf])


@pytest.fixture
def operation(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Operation]:
    """Makes an operation whose last, plain backend doubles."""
    monkeypatch.setattr(backends, "OPERATIONS", {})
    return lambda *others: Operation(
        "doubling", [*others, Backend("plain", double)], plain="plain", problem=small_problem
    )


@pytest.fixture(autouse=True)
def _chosen_as_before() -> Iterator[None]:
    yield
    use_kernels(**dict.fromkeys(OPERATIONS, "auto"))


def test_the_first_that_can_is_taken(operation: Callable[..., Operation]) -> None:
    fast = Backend("fast", double, devices=("cpu",), dtypes=(torch.float32,))
    chosen = operation(fast)
    assert chosen.choose(CPU).name == "fast"
    assert chosen.choose(Task("cpu", torch.float64)).name == "plain"
    assert chosen.choose(CPU, "plain").name == "plain"


@pytest.mark.parametrize(
    ("backend", "task", "reason"),
    [
        (Backend("b", double, devices=("cuda", "xpu")), CPU, "it runs on cuda and xpu, not on cpu"),
        (Backend("b", double, dtypes=(torch.float16,)), CPU, "it takes float16, not float32"),
        (Backend("b", double, gradients=False), CPU, "it has no backward"),
        (
            Backend("b", double, initial_state=False),
            Task("cpu", torch.float32, has_initial_state=True),
            "it cannot go on",
        ),
        (Backend("b", double, unavailable_reason=lambda: "not installed"), CPU, "not installed"),
        (Backend("b", double, unsupported_reason=lambda task: f"widths {task.widths}"), CPU, r"widths \(64, 128\)"),
    ],
)
def test_what_a_backend_declares_decides(
    operation: Callable[..., Operation], backend: Backend, task: Task, reason: str
) -> None:
    chosen = operation(backend)
    assert chosen.choose(task).name == "plain"
    with pytest.raises(ValueError, match=f"the doubling backend b cannot be used: {reason}.*; plain can"):
        chosen.choose(task, "b")


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (lambda x: 3 * x, r"its results are off by 5\.0e-01; 1e-03 is allowed"),
        (lambda x: 2 * x.detach() + 0 * x, r"its results are off by 1\.0e\+00"),  # right but for its gradient
        (lambda x: x * float("nan"), r"its results are off by inf"),
        (lambda x: x.no_such_thing, r"it failed on a small problem: AttributeError: 'Tensor' object has no"),
    ],
    ids=["wrong", "wrong gradient", "nan", "fails"],
)
def test_a_foreign_backend_that_does_not_work_is_left_out_and_said_so_once(
    operation: Callable[..., Operation], caplog: pytest.LogCaptureFixture, run: Callable[[Tensor], Tensor], reason: str
) -> None:
    chosen = operation(Backend("foreign", run, needs_self_test=True))
    with caplog.at_level(logging.WARNING), torch.no_grad():
        assert chosen.choose(CPU).name == "plain"
        assert chosen.choose(CPU).name == "plain"
    assert len(caplog.messages) == 1
    assert "The doubling backend foreign is left out" in caplog.text
    with pytest.raises(ValueError, match=f"foreign cannot be used: {reason}.*; plain can"):
        chosen.choose(CPU, "foreign")


class WrongGradient(torch.autograd.Function):
    """Doubles; its backward takes autocast for something else."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(_: Any, dy: Tensor) -> Tensor:
        return dy * (3 if torch.is_autocast_enabled("cpu") else 2)


class FailingGradient(WrongGradient):
    """Puts what autocast narrowed among wider numbers."""

    @staticmethod
    def backward(_: Any, dy: Tensor) -> Tensor:
        dx = torch.empty_like(dy)
        dx[torch.arange(len(dy))] = torch.eye(len(dy)) @ dy
        return dx * 2


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (WrongGradient, r"its results under autocast are off by 5\.0e-01; 5e-02 is allowed"),
        (FailingGradient, r"it failed on a small problem under autocast: RuntimeError: Index put requires"),
    ],
    ids=["wrong", "fails"],
)
def test_a_foreign_backend_that_does_not_work_under_autocast_is_left_out(
    operation: Callable[..., Operation], function: type[torch.autograd.Function], reason: str
) -> None:
    with pytest.raises(ValueError, match=f"foreign cannot be used: {reason}"):
        operation(Backend("foreign", function.apply, needs_self_test=True)).choose(CPU, "foreign")


def test_a_foreign_backend_that_fails_after_all_is_left_out_and_the_computation_goes_on(
    operation: Callable[..., Operation], caplog: pytest.LogCaptureFixture
) -> None:
    def only_small(x: Tensor) -> Tensor:
        if len(x) > 3:
            raise RuntimeError("out of resource: shared memory\nand much more")
        return 2 * x

    chosen = operation(Backend("foreign", only_small, needs_self_test=True))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert torch.equal(chosen.compute(CPU, torch.ones(5)), torch.full((5,), 2.0))
    assert caplog.messages == [
        "The doubling backend foreign is left out: it failed: RuntimeError: out of resource: shared memory"
    ]
    with pytest.raises(ValueError, match="foreign cannot be used: it failed: RuntimeError: out of resource"):
        chosen.compute(CPU, torch.ones(5), name="foreign")


def test_a_forced_backend_that_fails_and_one_out_of_memory_stop_the_computation(
    operation: Callable[..., Operation],
) -> None:
    def fails(x: Tensor) -> Tensor:
        if len(x) > 3:
            raise torch.OutOfMemoryError("no memory")
        return 2 * x

    chosen = operation(Backend("foreign", fails, needs_self_test=True))
    for name in (None, "foreign"):
        with pytest.raises(torch.OutOfMemoryError, match="no memory"):
            chosen.compute(CPU, torch.ones(5), name=name)


def test_a_foreign_backend_that_works_is_taken(operation: Callable[..., Operation]) -> None:
    assert operation(Backend("foreign", double, needs_self_test=True)).choose(CPU).name == "foreign"


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS.keys())
@pytest.mark.parametrize("has_initial_state", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
def test_every_backend_usable_here_passes_its_small_problem(
    operation: Operation, gradients: bool, has_initial_state: bool
) -> None:
    task = Task("cpu", torch.float32, gradients=gradients, has_initial_state=has_initial_state)
    usable = [name for name, reason in operation.obstacles(task).items() if reason is None]
    assert [operation._try(operation.backends[name], task) for name in usable] == [None] * len(usable)


def test_a_backend_can_be_forced_for_the_process() -> None:
    before = use_kernels(scan="reference")
    assert before == {"scan": "auto"}
    assert SCAN.choose(CPU).name == "reference"
    assert survey(CPU)["scan"].taken == "reference"
    assert use_kernels(**before) == {"scan": "reference"}
    assert SCAN.choose(CPU).name != "reference"


def test_unknown_choices_are_refused_and_change_nothing() -> None:
    with pytest.raises(ValueError, match="'scn' has no kernels to choose; expected one of"):
        use_kernels(scan="torch", scn="torch")
    with pytest.raises(ValueError, match="scan backend 'cuda'; expected one of auto, native"):
        use_kernels(conv="torch", scan="cuda")
    assert {operation.chosen for operation in OPERATIONS.values()} == {"auto"}


def test_generation_does_without_a_forced_backend_that_cannot_go_on_from_a_cache(
    operation: Callable[..., Operation],
) -> None:
    chosen = operation(Backend("whole texts", double, initial_state=False))
    chosen.chosen = "whole texts"
    assert chosen.choose(CPU).name == "whole texts"
    assert chosen.choose(Task("cpu", torch.float32, has_initial_state=True)).name == "plain"


def test_a_survey_accounts_for_every_backend() -> None:
    for name, choice in survey(CPU).items():
        accounted = [choice.taken, *choice.usable, *choice.obstacles]
        assert sorted(accounted) == sorted(OPERATIONS[name].backends)

"""Which backend is selected for a task, why others are not, and what happens to one that fails."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from hymba_tune.model import backends, use_kernels
from hymba_tune.model.attention import ATTENTION
from hymba_tune.model.backends import OPERATIONS, Backend, Operation, Problem, Task, survey
from hymba_tune.model.scan import SCAN
from tests.conftest import ROOT

CPU = Task("cpu", torch.float32)


def double(x: Tensor) -> Tensor:
    return 2 * x


def small_problem(task: Task) -> Problem:
    leaf = torch.ones(3, dtype=task.dtype, requires_grad=task.gradients)
    return Problem(lambda backend: (backend.run(leaf),), [leaf])


@pytest.fixture
def operation(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Operation]:
    """Return a function that makes an operation whose last, plain backend doubles."""
    monkeypatch.setattr(backends, "OPERATIONS", {})
    return lambda *others: Operation(
        "doubling", [*others, Backend("plain", double)], plain="plain", problem=small_problem
    )


@pytest.fixture(autouse=True)
def _restore_kernels() -> Iterator[None]:
    yield
    use_kernels(**dict.fromkeys(OPERATIONS, "auto"))


def test_the_first_usable_backend_is_selected(operation: Callable[..., Operation]) -> None:
    fast = Backend("fast", double, devices=("cpu",), dtypes=(torch.float32,))
    chosen = operation(fast)
    assert chosen.choose(CPU).name == "fast"
    assert chosen.choose(Task("cpu", torch.float64)).name == "plain"
    assert chosen.choose(CPU, "plain").name == "plain"


def test_a_choice_is_made_once(operation: Callable[..., Operation]) -> None:
    asked = []
    chosen = operation(Backend("fast", double, unavailable_reason=lambda: asked.append("fast")))
    assert [chosen.choose(CPU).name for _ in range(3)] == ["fast"] * 3
    assert asked == ["fast"]

    chosen.backends["fast"] = Backend("fast", double, unavailable_reason=lambda: "gone")
    assert chosen.choose(CPU).name == "plain"


def test_a_backend_that_starts_slowly_is_preferred_for_training_only(operation: Callable[..., Operation]) -> None:
    chosen = operation(Backend("compiled", double, slow_start=True), Backend("ready", double))
    assert chosen.choose(CPU).name == "compiled"
    assert chosen.choose(Task("cpu", torch.float32, gradients=False)).name == "ready"


def test_attention_on_a_gpu_starts_without_compilation_where_no_gradients_are_asked() -> None:
    names = [b.name for b in ATTENTION._by_preference(Task("cuda", torch.bfloat16, gradients=False))]
    assert names.index("flash") < names.index("flex")


@pytest.mark.parametrize(
    ("backend", "task", "reason"),
    [
        (Backend("b", double, devices=("cuda", "xpu")), CPU, "it runs on cuda and xpu, not on cpu"),
        (Backend("b", double, dtypes=(torch.float16,)), CPU, "it supports float16, not float32"),
        (Backend("b", double, gradients=False), CPU, "it has no backward"),
        (
            Backend("b", double, initial_state=False),
            Task("cpu", torch.float32, has_initial_state=True),
            "it cannot continue from an initial state",
        ),
        (Backend("b", double, unavailable_reason=lambda: "not installed"), CPU, "not installed"),
        (Backend("b", double, unsupported_reason=lambda task: f"widths {task.widths}"), CPU, r"widths \(64, 128\)"),
    ],
)
def test_a_backend_is_not_selected_for_a_task_that_it_does_not_support(
    operation: Callable[..., Operation], backend: Backend, task: Task, reason: str
) -> None:
    chosen = operation(backend)
    assert chosen.choose(task).name == "plain"
    with pytest.raises(ValueError, match=f"the doubling backend b cannot be used: {reason}.*; plain can"):
        chosen.choose(task, "b")


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (lambda x: 3 * x, r"its results have a relative error of 5\.0e-01, above 1e-03"),
        (
            lambda x: 2 * x.detach() + 0 * x,
            r"its results have a relative error of 1\.0e\+00",
        ),  # only its gradient is wrong
        (lambda x: x * float("nan"), r"its results have a relative error of inf"),
        (lambda x: x.no_such_thing, r"it failed on a small problem: AttributeError: 'Tensor' object has no"),
    ],
    ids=["wrong", "wrong gradient", "nan", "fails"],
)
def test_a_backend_that_fails_its_self_test_is_excluded_with_one_warning(
    operation: Callable[..., Operation], caplog: pytest.LogCaptureFixture, run: Callable[[Tensor], Tensor], reason: str
) -> None:
    chosen = operation(Backend("foreign", run, needs_self_test=True))
    with caplog.at_level(logging.WARNING), torch.no_grad():
        assert chosen.choose(CPU).name == "plain"
        assert chosen.choose(CPU).name == "plain"
    assert len(caplog.messages) == 1
    assert "The doubling backend foreign is not used" in caplog.text
    with pytest.raises(ValueError, match=f"foreign cannot be used: {reason}.*; plain can"):
        chosen.choose(CPU, "foreign")


class WrongGradient(torch.autograd.Function):
    """Doubles; its backward is wrong under autocast."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(_: Any, dy: Tensor) -> Tensor:
        return dy * (3 if torch.is_autocast_enabled("cpu") else 2)


class FailingGradient(WrongGradient):
    """Doubles; its backward writes a result of autocast into a tensor of another dtype, which fails."""

    @staticmethod
    def backward(_: Any, dy: Tensor) -> Tensor:
        dx = torch.empty_like(dy)
        dx[torch.arange(len(dy))] = torch.eye(len(dy)) @ dy
        return dx * 2


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (WrongGradient, r"its results under autocast have a relative error of 5\.0e-01, above 5e-02"),
        (FailingGradient, r"it failed on a small problem under autocast: RuntimeError: Index put requires"),
    ],
    ids=["wrong", "fails"],
)
def test_a_backend_that_fails_its_self_test_under_autocast_is_excluded(
    operation: Callable[..., Operation], function: type[torch.autograd.Function], reason: str
) -> None:
    with pytest.raises(ValueError, match=f"foreign cannot be used: {reason}"):
        operation(Backend("foreign", function.apply, needs_self_test=True)).choose(CPU, "foreign")


def test_a_backend_that_fails_after_its_self_test_is_excluded_and_another_computes(
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
        "The doubling backend foreign is not used: it failed: RuntimeError: out of resource: shared memory"
    ]
    with pytest.raises(ValueError, match="foreign cannot be used: it failed: RuntimeError: out of resource"):
        chosen.compute(CPU, torch.ones(5), name="foreign")


def test_an_error_after_which_the_device_computes_nothing_is_raised(
    operation: Callable[..., Operation], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    chosen = operation(Backend("foreign", fails, needs_self_test=True))
    task = Task("cuda", torch.float32)
    chosen._self_tests["foreign", task] = None
    monkeypatch.setattr(torch.cuda, "synchronize", fails)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        chosen.compute(task, torch.ones(3))
    assert chosen.choose(task).name == "foreign"  # so that the message of the run names it

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert torch.equal(chosen.compute(task, torch.ones(3)), torch.full((3,), 2.0))


def test_out_of_memory_is_raised_and_does_not_exclude_a_backend(
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


def test_out_of_memory_in_a_self_test_does_not_exclude_a_backend(operation: Callable[..., Operation]) -> None:
    full = [True, False]

    def fails(x: Tensor) -> Tensor:
        if full and full.pop(0):
            raise torch.OutOfMemoryError("no memory")
        return 2 * x

    chosen = operation(Backend("foreign", fails, needs_self_test=True))
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        chosen.choose(CPU)
    assert chosen.choose(CPU).name == "foreign"


def test_a_backend_that_passes_its_self_test_is_selected(operation: Callable[..., Operation]) -> None:
    assert operation(Backend("foreign", double, needs_self_test=True)).choose(CPU).name == "foreign"


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS.keys())
@pytest.mark.parametrize("has_initial_state", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
def test_every_usable_backend_passes_its_self_test(
    operation: Operation, gradients: bool, has_initial_state: bool
) -> None:
    task = Task("cpu", torch.float32, gradients=gradients, has_initial_state=has_initial_state)
    usable = [name for name, reason in operation.obstacles(task).items() if reason is None]
    assert [operation._self_test(operation.backends[name], task) for name in usable] == [None] * len(usable)


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


def test_generation_does_not_use_a_chosen_backend_that_cannot_continue_from_a_cache(
    operation: Callable[..., Operation],
) -> None:
    chosen = operation(Backend("whole texts", double, initial_state=False))
    chosen.chosen = "whole texts"
    assert chosen.choose(CPU).name == "whole texts"
    assert chosen.choose(Task("cpu", torch.float32, has_initial_state=True)).name == "plain"


def test_a_survey_names_every_backend() -> None:
    for name, choice in survey(CPU).items():
        names = [choice.taken, *choice.usable, *choice.obstacles]
        assert sorted(names) == sorted(OPERATIONS[name].backends)


def test_the_page_on_kernels_lists_the_backends_of_each_operation() -> None:
    listed = {}
    for line in (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8").splitlines():
        names, *backends_of = line.split("|")[1:-1] or [""]
        for name in names.partition(":")[0].split(","):
            listed[name.strip()] = set(re.findall(r"`(\w+)`", " ".join(backends_of)))
    for name, operation in OPERATIONS.items():
        assert listed[name] == set(operation.backends)

"""All operations with backends: the scan against its twin at the released size, and the speed of every other one.

Operations are those that the model registers, so a new one appears here by itself: with the inputs below if they are
known, otherwise with the problem of its self-test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, product
from typing import Any, NamedTuple

import torch
from gpu_cases import packed_documents, results, scan_case
from gpu_kernels import BOTH, CHANNELS, FORWARD, STATES, timed, usable
from gpu_measure import TIMES, TIMES_NOTES, Bench, Failure
from gpu_parity import ALLOWED, DTYPES, Outcome, verdict
from harness import short
from torch import Tensor

from hymba_tune.model.backends import OPERATIONS, Backend, Operation, Task

TWIN_COLUMNS = (
    "operation",
    "tokens",
    "texts",
    "format",
    "backend",
    "outputs",
    "gradients",
    "allowed",
    "repeats",
    "verdict",
)
COLUMNS = ("operation", "function", "pass", "backend", *TIMES, "launches", "floor ms", "× floor", "extra MB")
MEASURED_ELSEWHERE = ("scan", "attention")
WIDTH, HEADS, HEAD, WIDE = 1600, 25, 64, 5504
"""The released model's width, its query heads and their width, and the width of its feed-forward layer."""
SIZES = {"prepare": (HEADS, HEAD, 5, 128, CHANNELS, 4), "update": (CHANNELS, 100, STATES)}
"""The released model's sizes, as the operations of one new token of each text have them in their tasks."""
TWIN = "torch"


def twin(bench: Bench) -> None:
    """Compare the scan's kernels at the released size with plain torch on the same device, and with themselves."""
    notes = [
        f"relative errors against {TWIN} on this device; E {CHANNELS}, N {STATES}, each text has its initial states",
        "repeats: whether a second call gives the same bits",
    ]
    layouts = {64: 1, 65: 5} if bench.quick else {2048: 1, 8192: 16, 65536: 1}
    channels = 32 if bench.quick else CHANNELS
    with bench.table("twin", TWIN_COLUMNS, notes) as table:
        for (tokens, texts), dtype in product(layouts.items(), reversed(DTYPES)):
            if tokens > 8192 and dtype is torch.float32:
                continue  # half the memory, and the same offsets
            lengths = [tokens // texts] * texts
            case = scan_case(bench.device, dtype, "", lengths, channels, STATES, "own")
            backends = usable(OPERATIONS["scan"], case.task, table)
            row = {"operation": "scan", "tokens": tokens, "texts": texts, "format": short(dtype)}
            expected = bench.attempt(
                f"{TWIN}, {tokens} tokens", results, partial(case.run, backends.pop(TWIN)), case.leaves()
            )
            if isinstance(expected, Failure):
                table.note(f"{tokens} tokens, {short(dtype)}: {TWIN} failed: {expected}")
                continue
            for name, backend in backends.items():
                row["backend"] = name
                found = bench.attempt(f"{name}, {tokens} tokens", _against, case, backend, expected)
                outcomes, same = (found, None) if isinstance(found, Failure) else found
                table.add(row | {"repeats": same} | verdict(bench, row, outcomes, ALLOWED[dtype], table))


def _against(case: Any, backend: Backend, expected: Mapping[str, Tensor]) -> tuple[list[Outcome], str]:
    """A backend's errors, and whether it gives the same bits again."""
    actual, again = (results(partial(case.run, backend), case.leaves()) for _ in range(2))
    same = all(torch.equal(again[name], x) for name, x in actual.items())
    return [Outcome.of("at the released size", actual, expected)], "yes" if same else "no"


class Call(NamedTuple):
    """A call of an operation.

    Attributes:
        function: The function's name.
        compute: Computes the outputs of a backend.
        leaves: The inputs.
        trains: Whether it has a backward.
    """

    function: str
    compute: Callable[[Backend], Sequence[Tensor]]
    leaves: Sequence[Tensor]
    trains: bool = True


def operations(bench: Bench) -> None:
    """Time the backends of every operation that has no table of its own, in bfloat16."""
    limits = bench.limits
    rows = 64 if bench.quick else 8192
    notes = [
        f"{rows:,} tokens of the released model's widths; a function called problem is the self-test's, which is small",
        *TIMES_NOTES,
        "floor: the inputs and outputs, with backward also their gradients, once at a large copy's bandwidth",
    ]
    with bench.table("operations", COLUMNS, notes) as table:
        for operation in OPERATIONS.values():
            if operation.name in MEASURED_ELSEWHERE:
                continue
            for call, passes in product(calls(bench, operation, rows), (FORWARD, BOTH)):
                if passes == BOTH and not call.trains:
                    continue
                backends = usable(operation, _task(bench, operation), table)
                ways = {name: partial(_run, call, backend, passes) for name, backend in backends.items()}
                floor = _moved(call, operation._plain, passes) / limits.bandwidth
                case = {"operation": operation.name, "function": call.function, "pass": passes}
                for row, measured in timed(bench, case, ways, table):
                    ratio = (measured.busy or measured.timing.median) / floor
                    table.add(row | {"floor ms": 1e3 * floor, "× floor": ratio})


def _task(bench: Bench, operation: Operation) -> Task:
    trains = operation._trains
    sizes = SIZES.get(operation.name, ())
    return Task(bench.device.type, torch.bfloat16, trains, has_initial_state=not trains, sizes=sizes)


def calls(bench: Bench, operation: Operation, rows: int) -> Iterator[Call]:
    """The calls of an operation that are timed, one for each of its functions if it has several."""
    known = _known(bench.device, rows)
    names = getattr(operation._plain.run, "_fields", (operation.name,))
    if operation._trains and set(names) <= known.keys():
        for name in names:
            yield Call(name, partial(_called, name, known[name]), [x for x in _flat(known[name]) if x.requires_grad])
        return
    problem = operation._problem(_task(bench, operation))
    yield Call("problem", problem.compute, problem.leaves, operation._trains)


def _known(device: torch.device, rows: int) -> dict[str, tuple[Any, ...]]:
    """The arguments of functions by name, with the released model's widths."""

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16).requires_grad_()

    x, update, weight = leaf(rows, WIDTH), leaf(rows, WIDTH), leaf(WIDTH)
    inner, other, inner_weight = leaf(rows, CHANNELS), leaf(rows, CHANNELS), leaf(CHANNELS)
    taps, bias = leaf(CHANNELS, 4), leaf(CHANNELS)
    heads, head_weight = leaf(rows, HEADS, HEAD), leaf(HEAD)
    tables = tuple(table.detach() for table in (leaf(rows, 1, HEAD), leaf(rows, 1, HEAD)))
    return {
        "rms_norm": (x, weight, 1e-6),
        "add_rms_norm": (x, update, weight, 1e-6),
        "mean_of_norms": (inner, inner_weight, other, inner_weight, 1e-6),
        "gated_silu": (leaf(rows, WIDE), leaf(rows, WIDE)),
        "rotate": (heads, tables),
        "norm_rotate": (heads, head_weight, 1e-6, tables),
        "alone": (inner, taps, bias),
        "packed": (inner, taps, bias, packed_documents(rows // 2, [rows // 8] * 4, device), None, False),
    }


def _called(name: str, arguments: tuple[Any, ...], backend: Backend) -> Sequence[Tensor]:
    outputs = getattr(backend.run, name, backend.run)(*arguments)
    return [outputs] if isinstance(outputs, Tensor) else [x for x in outputs if x is not None]


def _flat(arguments: tuple[Any, ...]) -> Iterator[Tensor]:
    several = (argument if isinstance(argument, tuple) else (argument,) for argument in arguments)
    return (x for x in chain.from_iterable(several) if isinstance(x, Tensor))


def _run(call: Call, backend: Backend, passes: str) -> None:
    with torch.set_grad_enabled(passes == BOTH):
        outputs = call.compute(backend)
    if passes == BOTH:
        torch.autograd.grad(outputs, call.leaves, [x.detach() for x in outputs])


def _moved(call: Call, plain: Backend, passes: str) -> int:
    """The bytes of the inputs and outputs of a call; the backward reads them again and writes as many."""
    with torch.no_grad():
        outputs = call.compute(plain)
    moved = sum(x.nbytes for x in (*call.leaves, *outputs))
    return moved if passes == FORWARD else 3 * moved

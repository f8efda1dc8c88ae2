"""One layer's scan and attention at the released size: the speed of each backend, and the lower bound of its time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
from gpu_journal import Row, Table
from gpu_measure import TIMES, TIMES_NOTES, Bench, Failure, Limits, Measured
from harness import Cell
from torch import Tensor

from hymba_tune.model.backends import OPERATIONS, Backend, Operation, Task
from hymba_tune.model.documents import Documents, find_documents
from hymba_tune.model.scan_inputs import ScanInputs

SCAN_COLUMNS = ("tokens", "texts", "pass", "backend", *TIMES, "floor ms", "bound by", "× floor", "extra MB")
ATTENTION_COLUMNS = ("tokens", "window", "pass", "backend", *TIMES, "TFLOP/s", "% of matmul", "extra MB")
CHANNELS, STATES = 3200, 16
WIDTHS = (64, 128)
"""Widths of a query head and of a value head."""
TOO_SLOW = ("reference",)
"""Reference backends, which are not timed."""
FORWARD, BOTH = "forward", "and backward"


class Heads(NamedTuple):
    """The released model's heads and meta tokens."""

    queries: int = 25
    groups: int = 5
    meta: int = 128


TOY = Heads(5, 1, 16)


@dataclass(frozen=True)
class Floor:
    """The minimum work of a pass of the scan; the GPU needs at least the longest of the three times.

    Attributes:
        moved: Bytes that are read or written once: per token and channel, 2 bytes each of u, z and y and 4 of dt; B
            and C; the final states. The backward reads all but y again, reads y's gradient and writes the gradients.
        exponentials: One per token and state, and one more in the backward, which recomputes the states.
        multiply_adds: In float32. A state needs 4: exponent, input, sum, output. The backward recomputes them and
            needs 8 more: the gradients of the state, of its decay, and of A, B, C, dt and u.
    """

    moved: float
    exponentials: float
    multiply_adds: float

    @classmethod
    def of(cls, tokens: int, channels: int, texts: int, passes: str) -> Floor:
        """The minimum work of a pass over this many tokens."""
        wide = tokens * channels
        states = wide * STATES
        moved = 10 * wide + 4 * tokens * STATES + 4 * texts * channels * STATES
        if passes == FORWARD:
            return cls(moved, states, 4 * states)
        return cls(moved + 18 * wide + 8 * tokens * STATES, 2 * states, 16 * states)

    def seconds(self, limits: Limits) -> tuple[float, str]:
        """The longest of the three times, and the name of the resource."""
        times = {"bytes": self.moved / limits.bandwidth}
        if limits.special is not None and limits.float32 is not None:
            times["exp"] = self.exponentials / limits.special
            times["fma"] = self.multiply_adds / limits.float32
        longest = max(times, key=lambda name: times[name])
        return times[longest], longest


def scan(bench: Bench) -> None:
    """Time every backend of the scan in bfloat16 from zero initial states, relative to the GPU's lower bound."""
    limits = bench.limits
    channels = 32 if bench.quick else CHANNELS
    notes = [
        f"E {channels}, N {STATES}; u, z, B and C bfloat16, dt float32",
        *TIMES_NOTES,
        "floor: the longest of 10 (with backward 28) bytes per token and channel at a large copy's bandwidth, T·E·N "
        "(2·T·E·N) exponentials at 16 per clock and SM, 4·T·E·N (16·T·E·N) multiply-adds at 64 or 128",
    ]
    with bench.table("scan", SCAN_COLUMNS, notes) as table:
        backends = usable(OPERATIONS["scan"], Task(bench.device.type, torch.bfloat16), table)
        for tokens, texts, passes in product((64,) if bench.quick else (2048, 8192), (1, 16), (FORWARD, BOTH)):
            inputs = _scan_inputs(bench, tokens, channels, texts)
            ways = {name: partial(_scan, backend, inputs, passes) for name, backend in backends.items()}
            seconds, bound = Floor.of(tokens, channels, texts, passes).seconds(limits)
            case: Row = {"tokens": tokens, "texts": texts, "pass": passes}
            for row, measured in timed(bench, case, ways, table):
                ratio = (measured.busy or measured.timing.median) / seconds
                table.add(row | {"floor ms": seconds * 1e3, "bound by": bound, "× floor": ratio})


def attention(bench: Bench) -> None:
    """Time every backend of attention in bfloat16 on one text, windowed and global."""
    limits = bench.limits
    heads, (width, value_width) = TOY if bench.quick else Heads(), WIDTHS
    notes = [
        f"{heads.queries} query heads of {width}, {heads.groups} value heads of {value_width}, "
        f"{heads.meta} meta tokens, one text; bfloat16",
        *TIMES_NOTES,
        "TFLOP/s: 2 (a + v) per head and visible pair of query and key, backward 2 (3 a + 2 v) more, divided by "
        f"kernels ms; a large matmul reaches {limits.matmul / 1e12:.0f}",
    ]
    sizes, windows = ((64,), (16, None)) if bench.quick else ((2048, 8192), (1024, None))
    with bench.table("attention", ATTENTION_COLUMNS, notes) as table:
        backends = usable(OPERATIONS["attention"], Task(bench.device.type, torch.bfloat16, widths=WIDTHS), table)
        for tokens, window, passes in product(sizes, windows, (FORWARD, BOTH)):
            inputs = _attention_inputs(bench, heads, tokens)
            ways = {name: partial(_attend, backend, inputs, window, passes) for name, backend in backends.items()}
            case: Row = {"tokens": tokens, "window": "all" if window is None else window, "pass": passes}
            for row, measured in timed(bench, case, ways, table):
                seconds = measured.busy or measured.timing.median
                rate = attention_flops(heads, tokens, window, passes) / seconds
                table.add(row | {"TFLOP/s": rate / 1e12, "% of matmul": 100 * rate / limits.matmul})


def usable(operation: Operation, task: Task, table: Table) -> dict[str, Backend]:
    """The backends to time; obstacles of the others go to the notes."""
    backends = {}
    for name, obstacle in operation.obstacles(task).items():
        if obstacle:
            table.note(f"{operation.name} {name} is not used: {obstacle}")
        elif name not in TOO_SLOW:
            backends[name] = operation.backends[name]
    return backends


def timed(
    bench: Bench, case: Row, ways: Mapping[str, Callable[[], None]], table: Table
) -> Iterator[tuple[dict[str, Cell], Measured]]:
    """A row's first cells and the measurements of each way; failures go to the notes."""
    what = ", ".join(f"{key} {value}" for key, value in case.items())
    for name, measured in bench.measure(what, ways).items():
        if isinstance(measured, Failure):
            table.note(f"{what}, {name} failed: {measured}")
        else:
            yield {**case, "backend": name, **measured.cells()}, measured


def _call(compute: Callable[[], Tensor], passes: str, leaves: Sequence[Tensor], d_output: Tensor) -> None:
    with torch.set_grad_enabled(passes == BOTH):
        output = compute()
    if passes == BOTH:
        torch.autograd.grad(output, leaves, d_output)


def _scan_inputs(bench: Bench, tokens: int, channels: int, texts: int) -> ScanInputs:
    torch.manual_seed(0)
    u, z = (_bfloat16(bench, tokens, channels) for _ in "uz")
    b, c = (_bfloat16(bench, tokens, STATES) for _ in "bc")
    dt = torch.randn(tokens, channels, device=bench.device) - 4
    a = -torch.arange(1.0, STATES + 1, device=bench.device).repeat(channels, 1)
    d = torch.ones(channels, device=bench.device, dtype=torch.bfloat16)
    for leaf in (u, dt, a, b, c, d, z):
        leaf.requires_grad_()
    return ScanInputs(u, dt, a, b, c, d, z, None, None, tuple(range(0, tokens + 1, tokens // texts)))


def _scan(backend: Backend, inputs: ScanInputs, passes: str) -> None:
    leaves = [x for x in inputs.tensors if x is not None]
    _call(lambda: backend.run(inputs)[0], passes, leaves, inputs.u.detach())


@dataclass(frozen=True)
class _AttentionInputs:
    leaves: list[Tensor]
    d_output: Tensor
    documents: Documents


def _attention_inputs(bench: Bench, heads: Heads, tokens: int) -> _AttentionInputs:
    torch.manual_seed(0)
    rows, (width, value_width) = heads.meta + tokens, WIDTHS
    query, key = (_bfloat16(bench, rows, count, width) for count in (heads.queries, heads.groups))
    # In the model, values are columns of a projection and not contiguous; queries and keys are, after rotary embedding.
    value = _bfloat16(bench, rows, 2 * heads.groups, value_width)[:, : heads.groups]
    leaves = [x.requires_grad_() for x in (query, key, value)]
    # One layout for all calls, as for all layers: what a backend derives from it is computed once.
    documents = find_documents((1, tokens), bench.device, num_meta=heads.meta)
    return _AttentionInputs(leaves, _bfloat16(bench, rows, heads.queries * value_width), documents)


def _attend(backend: Backend, inputs: _AttentionInputs, window: int | None, passes: str) -> None:
    compute = partial(backend.run, *inputs.leaves, inputs.documents, window)
    _call(compute, passes, inputs.leaves, inputs.d_output)


def attention_flops(heads: Heads, tokens: int, window: int | None, passes: str) -> int:
    """FLOP of the matrix products of one layer, for one text with meta tokens."""
    width, value_width = WIDTHS
    reach = tokens - 1 if window is None else min(window, tokens - 1)
    among_text = (reach + 1) * (reach + 2) // 2 + (tokens - reach - 1) * (reach + 1)
    pairs = heads.meta * (heads.meta + 1) // 2 + tokens * heads.meta + among_text
    forward = 2 * (width + value_width)
    return heads.queries * pairs * (forward if passes == FORWARD else forward + 2 * (3 * width + 2 * value_width))


def _bfloat16(bench: Bench, *shape: int) -> Tensor:
    return torch.randn(shape, device=bench.device, dtype=torch.bfloat16)

"""Correctness of every backend on this device: outputs and every gradient, against the tests' reference versions.

Operations without a reference version are compared with their plain backend, on the problem of their self-test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
from gpu_cases import (
    WIDTHS,
    Case,
    Values,
    attention_cases,
    convolution_cases,
    relative_error,
    results,
    scan_cases,
    with_gradients,
)
from gpu_journal import Row, Table
from gpu_measure import Bench, Failure
from harness import Cell, short
from torch import Tensor

from hymba_tune.model import HymbaCache, HymbaConfig, HymbaForCausalLM, use_kernels
from hymba_tune.model.backends import OPERATIONS, Backend, Operation, Task
from hymba_tune.model.cache import CACHE_NAME
from tests.tolerances import BFLOAT16, BFLOAT16_MODEL, FLOAT32, FLOAT32_GRADIENT

COLUMNS = ("operation", "format", "backend", "layouts", "outputs", "gradients", "allowed", "verdict")
DTYPES = (torch.float32, torch.bfloat16)
ALLOWED = {torch.float32: (FLOAT32.relative, FLOAT32_GRADIENT.relative), torch.bfloat16: (BFLOAT16.relative,) * 2}
MODEL_ALLOWED = {torch.float32: FLOAT32_GRADIENT.relative, torch.bfloat16: BFLOAT16_MODEL.relative}
MAKERS = {"scan": scan_cases, "conv": convolution_cases, "attention": attention_cases}
"""The cases of the operations that have a reference version."""


@dataclass(frozen=True)
class Outcome:
    """Relative errors on one layout: of the outputs, of the gradients, and the name of the largest."""

    outputs: float
    gradients: float
    worst: str

    @classmethod
    def of(cls, layout: str, actual: Values, expected: Values) -> Outcome:
        """The largest errors between two `results`."""
        errors = {name: relative_error(actual[name], truth) for name, truth in expected.items()}
        worst = max(errors, key=lambda name: errors[name])
        outputs, gradients = (
            max((error for name, error in errors.items() if name.startswith("gradient") == gradient), default=0.0)
            for gradient in (False, True)
        )
        return cls(outputs, gradients, f"{worst}, {layout}")


def parity(bench: Bench) -> None:
    """Check every usable backend of every operation, and within a small model, in training and in generation."""
    notes = ["relative errors of the worst layout: norm of the difference over the norm of the reference"]
    with bench.table("parity", COLUMNS, notes) as table:
        for dtype in DTYPES:
            for name, operation in OPERATIONS.items():
                if make := MAKERS.get(name):
                    table.extend(compare(bench, operation, dtype, list(make(bench, dtype)), table))
                else:
                    table.extend(compare_with_plain(bench, operation, dtype, table))
        for dtype in DTYPES[: 1 if bench.quick else None]:
            table.extend(compare_models(bench, dtype, table))


def compare(
    bench: Bench, operation: Operation, dtype: torch.dtype, cases: Sequence[Case], table: Table
) -> Iterator[Row]:
    """A row for each backend of an operation; obstacles and errors go to the notes."""
    expected = [case.expected() for case in cases]
    for backend in operation.backends.values():
        obstacles = [operation.obstacles(case.task)[backend.name] for case in cases]
        usable = [pair for *pair, obstacle in zip(cases, expected, obstacles, strict=True) if obstacle is None]
        row = {"operation": operation.name, "format": short(dtype), "backend": backend.name}
        if not usable:
            table.note(f"{' '.join(row.values())} is not used: {obstacles[0]}")
            continue
        outcomes = bench.attempt(" ".join(row.values()), _outcomes, bench, backend, usable)
        row["layouts"] = f"{len(usable)} of {len(cases)}"
        yield row | verdict(bench, row, outcomes, ALLOWED[dtype], table)


def _outcomes(bench: Bench, backend: Backend, cases: list[tuple[Case, Values]]) -> list[Outcome]:
    outcomes = []
    for case, expected in cases:
        bench.check_time()
        actual = results(partial(case.run, backend), case.leaves())
        outcomes.append(Outcome.of(case.layout, actual, expected))
    return outcomes


def compare_with_plain(bench: Bench, operation: Operation, dtype: torch.dtype, table: Table) -> Iterator[Row]:
    """A row for each backend of an operation without a reference version, on the problem of its self-test."""
    task = Task(bench.device.type, dtype, operation._trains, has_initial_state=not operation._trains)
    expected: Values | None = None
    for name, obstacle in operation.obstacles(task).items():
        row = {"operation": operation.name, "format": short(dtype), "backend": name}
        if obstacle:
            table.note(f"{' '.join(row.values())} is not used: {obstacle}")
            continue
        if expected is None:
            expected = solved(operation, task, operation._plain)
        outcomes = bench.attempt(" ".join(row.values()), _solved, operation, task, operation.backends[name], expected)
        row["layouts"] = "the self-test's"
        yield row | verdict(bench, row, outcomes, ALLOWED[dtype], table)


def _solved(operation: Operation, task: Task, backend: Backend, expected: Values) -> list[Outcome]:
    return [Outcome.of("the self-test's", solved(operation, task, backend), expected)]


def solved(operation: Operation, task: Task, backend: Backend) -> dict[str, Tensor]:
    """A backend's outputs of the self-test's problem, and the gradients of their weighted sum where it trains."""
    problem = operation._problem(task)
    if not task.gradients:
        with torch.no_grad():
            outputs = problem.compute(backend)
        return {f"output {place}": output for place, output in enumerate(outputs)}
    return with_gradients(problem.compute(backend), dict(enumerate(problem.leaves)))


def compare_models(bench: Bench, dtype: torch.dtype, table: Table) -> Iterator[Row]:
    """A row for each backend within a small model, with other operations chosen automatically.

    A backend with a backward is checked by the model's logits and gradients, one without by the logits of texts that
    continue token by token. Here a scan without initial states gets the layout that it needs.
    """
    torch.manual_seed(0)
    model = HymbaForCausalLM(_small_config(bench)).to(dtype)
    lengths = [33, 1, 7] if bench.quick else [300, 1, 64, 65, 130]
    exact = deepcopy(model).double()
    checks = {True: partial(_trained, lengths=lengths), False: _generated}
    expected = {trains: check(exact) for trains, check in checks.items()}
    model = model.to(bench.device)
    for operation in OPERATIONS.values():
        for trains, check in checks.items():
            task = Task(bench.device.type, dtype, trains, has_initial_state=not trains, widths=WIDTHS)
            for backend, obstacle in operation.obstacles(task).items():
                if obstacle or trains > operation._trains:
                    continue  # already in the notes, from `compare`
                what = "model" if trains else "generation"
                row = {"operation": f"{what}, {operation.name}", "format": short(dtype), "backend": backend}
                outcomes = bench.attempt(
                    " ".join(row.values()), _model_outcomes, check, model, expected[trains], operation, backend
                )
                row["layouts"] = "packed" if trains else "batch"
                yield row | verdict(bench, row, outcomes, (MODEL_ALLOWED[dtype],) * 2, table)


def _small_config(bench: Bench) -> HymbaConfig:
    heads, groups = (2, 1) if bench.quick else (10, 2)
    width = WIDTHS[0]
    return HymbaConfig(
        vocab_size=64,
        hidden_size=heads * width,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        num_memory_tokens=16,
        sliding_window=40,
        global_attn_idx=[0, 3],
        kv_reuse_group=[[1, 2]],
    )


def _model_outcomes(
    check: Callable[[HymbaForCausalLM], Values],
    model: HymbaForCausalLM,
    expected: Values,
    operation: Operation,
    backend: str,
) -> list[Outcome]:
    before = use_kernels(**{operation.name: backend})
    try:
        return [Outcome.of("in the model", check(model), expected)]
    finally:
        use_kernels(**before)


@torch.no_grad()
def _generated(model: HymbaForCausalLM) -> dict[str, Tensor]:
    """The logits of two texts that are read in part, and then continue token by token beyond the window."""
    ids = torch.randint(3, 64, (2, 50), generator=torch.Generator().manual_seed(1)).to(model.device)
    cache = HymbaCache(model.config)
    begin = ids.shape[1] - 6
    steps = [ids[:, :begin], *ids[:, begin:].split(1, 1)]
    logits = [model(input_ids=step, **{CACHE_NAME: cache}, use_cache=True).logits for step in steps]
    return {"logits": torch.cat(logits, 1)}


def _trained(model: HymbaForCausalLM, lengths: list[int]) -> dict[str, Tensor]:
    ids = torch.randint(3, 64, (1, sum(lengths)), generator=torch.Generator().manual_seed(1)).to(model.device)
    offsets = torch.tensor([0, *accumulate(lengths)], device=model.device)
    model.zero_grad(set_to_none=True)
    output = model(input_ids=ids, labels=ids, cu_seq_lens_q=offsets, use_cache=False)
    output.loss.backward()
    # One vector: gradients of the smallest parameters are sums that cancel, so bfloat16 rounding would dominate them.
    gradients = [parameter.grad.detach().double().flatten() for parameter in model.parameters()]
    return {"logits": output.logits.detach(), "gradient of all parameters": torch.cat(gradients)}


def verdict(
    bench: Bench,
    row: Mapping[str, Cell],
    outcomes: list[Outcome] | Failure,
    allowed: tuple[float, float],
    table: Table,
) -> dict[str, Cell]:
    """The last cells of a row; what is wrong goes to the notes and the failures."""
    what = f"{row['operation']} {row['format']} {row['backend']}"
    if isinstance(outcomes, Failure):
        table.note(f"{what}: {outcomes}")
        return {"verdict": "failed"}
    outputs = max(outcome.outputs for outcome in outcomes)
    gradients = max(outcome.gradients for outcome in outcomes)
    right = outputs <= allowed[0] and gradients <= allowed[1]
    if not right:
        worst = max(outcomes, key=lambda o: max(o.outputs / allowed[0], o.gradients / allowed[1])).worst
        failure = f"{what}: wrong by {max(outputs, gradients):.1e} at worst, {worst}"
        table.note(failure)
        bench.fail(failure)
    return {
        "outputs": f"{outputs:.1e}",
        "gradients": f"{gradients:.1e}",
        "allowed": " ".join(f"{limit:.0e}" for limit in dict.fromkeys(allowed)),
        "verdict": "right" if right else "WRONG",
    }

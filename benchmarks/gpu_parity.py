"""Correctness of every backend on this device: outputs and every gradient, against the tests' reference versions.

The references run in float64 on the CPU, on the same values that the backends get, rounded to the backends' dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from gpu_measure import Bench, Failure, Row
from harness import short
from torch import Tensor

from hymba_tune.model import HymbaConfig, HymbaForCausalLM, use_kernels
from hymba_tune.model.backends import OPERATIONS, Backend, Operation, Task
from hymba_tune.model.documents import find_documents
from hymba_tune.model.scan_inputs import ScanInputs
from tests.reference.naive_attention import naive_attention
from tests.reference.naive_convolution import naive_convolution
from tests.reference.naive_scan import naive_scan
from tests.tolerances import BFLOAT16, BFLOAT16_MODEL, FLOAT32, FLOAT32_GRADIENT

COLUMNS = ("operation", "format", "backend", "layouts", "outputs", "gradients", "allowed", "verdict")
DTYPES = (torch.float32, torch.bfloat16)
ALLOWED = {torch.float32: (FLOAT32.relative, FLOAT32_GRADIENT.relative), torch.bfloat16: (BFLOAT16.relative,) * 2}
MODEL_ALLOWED = {torch.float32: FLOAT32_GRADIENT.relative, torch.bfloat16: BFLOAT16_MODEL.relative}
WIDTHS = (64, 128)
"""Widths of the released model's query and value heads."""

Values = Mapping[str, Tensor]


@dataclass(frozen=True)
class Case:
    """An operation on one layout.

    Attributes:
        layout: The layout's name in the table.
        task: The task that the backends must support.
        values: The values of the leaves, in float32.
        run: Computes a backend's outputs from leaves on the device.
        naive: Computes the reference's outputs from float64 leaves on the CPU.
        wide: Names of leaves that stay float32 in every dtype, as they do in the model.
    """

    layout: str
    task: Task
    values: Values
    run: Callable[[Backend, Values], list[Tensor]]
    naive: Callable[[Values], list[Tensor]]
    wide: frozenset[str] = frozenset()

    def leaves(self) -> dict[str, Tensor]:
        """The values on the device, in the task's dtype."""
        dtypes = {name: torch.float32 if name in self.wide else self.task.dtype for name in self.values}
        return {name: value.to(self.task.device, dtypes[name]) for name, value in self.values.items()}

    def expected(self) -> Values:
        """The reference's results for the rounded leaves."""
        return results(self.naive, {name: leaf.double().cpu() for name, leaf in self.leaves().items()})


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
            max(error for name, error in errors.items() if name.startswith("gradient") == gradient)
            for gradient in (False, True)
        )
        return cls(outputs, gradients, f"{worst}, {layout}")


def parity(bench: Bench) -> None:
    """Check every usable backend, operation by operation and within a small model."""
    notes = ["relative errors of the worst layout: norm of the difference over the norm of the reference"]
    makers = {"scan": scan_cases, "conv": convolution_cases, "attention": attention_cases}
    with bench.table("parity", COLUMNS, notes) as rows:
        for dtype in DTYPES:
            for operation, make in makers.items():
                rows.extend(compare(bench, OPERATIONS[operation], dtype, list(make(bench, dtype)), notes))
        for dtype in DTYPES:
            rows.extend(compare_models(bench, dtype, notes))


def compare(
    bench: Bench, operation: Operation, dtype: torch.dtype, cases: Sequence[Case], notes: list[str]
) -> Iterator[Row]:
    """A row for each backend of an operation; obstacles and errors go to the notes."""
    expected = [case.expected() for case in cases]
    for backend in operation.backends.values():
        obstacles = [operation.obstacles(case.task)[backend.name] for case in cases]
        usable = [pair for *pair, obstacle in zip(cases, expected, obstacles, strict=True) if obstacle is None]
        row = {"operation": operation.name, "format": short(dtype), "backend": backend.name}
        if not usable:
            notes.append(f"{' '.join(row.values())} is not used: {obstacles[0]}")
            continue
        outcomes = bench.attempt(" ".join(row.values()), _outcomes, bench, backend, usable)
        row["layouts"] = f"{len(usable)} of {len(cases)}"
        yield row | _verdict(bench, row, outcomes, ALLOWED[dtype], notes)


def _outcomes(bench: Bench, backend: Backend, cases: list[Any]) -> list[Outcome]:
    outcomes = []
    for case, expected in cases:
        bench.check_time()
        actual = results(partial(case.run, backend), case.leaves())
        outcomes.append(Outcome.of(case.layout, actual, expected))
    return outcomes


def compare_models(bench: Bench, dtype: torch.dtype, notes: list[str]) -> Iterator[Row]:
    """A row for each backend within a small model, with other operations chosen automatically: logits and gradients.

    Here a scan without initial states gets the layout that it needs.
    """
    heads, groups = (2, 1) if bench.quick else (10, 2)
    width = WIDTHS[0]
    config = HymbaConfig(
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
    torch.manual_seed(0)
    model = HymbaForCausalLM(config).to(dtype)
    lengths = [33, 1, 7] if bench.quick else [300, 1, 64, 65, 130]
    expected = _model_results(deepcopy(model).double(), lengths)
    model = model.to(bench.device)
    for operation in OPERATIONS.values():
        for backend, obstacle in operation.obstacles(Task(bench.device.type, dtype, widths=WIDTHS)).items():
            if obstacle:
                continue  # already in the notes, from `compare`
            row = {"operation": f"model, {operation.name}", "format": short(dtype), "backend": backend}
            outcomes = bench.attempt(
                " ".join(row.values()), _model_outcomes, model, lengths, expected, operation, backend
            )
            row["layouts"] = "packed"
            yield row | _verdict(bench, row, outcomes, (MODEL_ALLOWED[dtype],) * 2, notes)


def _model_outcomes(
    model: HymbaForCausalLM, lengths: list[int], expected: Values, operation: Operation, backend: str
) -> list[Outcome]:
    before = use_kernels(**{operation.name: backend})
    try:
        return [Outcome.of("packed", _model_results(model, lengths), expected)]
    finally:
        use_kernels(**before)


def _model_results(model: HymbaForCausalLM, lengths: list[int]) -> dict[str, Tensor]:
    ids = torch.randint(3, 64, (1, sum(lengths)), generator=torch.Generator().manual_seed(1)).to(model.device)
    offsets = torch.tensor([0, *accumulate(lengths)], device=model.device)
    model.zero_grad(set_to_none=True)
    output = model(input_ids=ids, labels=ids, cu_seq_lens_q=offsets, use_cache=False)
    output.loss.backward()
    # One vector: gradients of the smallest parameters are sums that cancel, so bfloat16 rounding would dominate them.
    gradients = [parameter.grad.detach().double().flatten() for parameter in model.parameters()]
    return {"logits": output.logits.detach(), "gradient of all parameters": torch.cat(gradients)}


def results(compute: Callable[[Values], list[Tensor]], leaves: Values) -> dict[str, Tensor]:
    """The outputs, and the gradients of their weighted sum with respect to every leaf."""
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    outputs = compute(leaves)
    generator = torch.Generator().manual_seed(2)
    # Weights that every dtype represents exactly, so that the reference's backward starts from the same ones.
    weights = [torch.randint(-4, 5, x.shape, generator=generator).to(x.device, x.dtype) / 4 for x in outputs]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), weights)
    named = {f"output {place}": output.detach() for place, output in enumerate(outputs)}
    return named | {f"gradient of {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of the expected values, or over 1 if these are zero; infinite for NaN."""
    expected = expected.double().cpu()
    error = ((actual.double().cpu() - expected).norm() / (expected.norm().item() or 1.0)).item()
    return error if error == error else float("inf")


def _verdict(
    bench: Bench,
    row: Mapping[str, str],
    outcomes: list[Outcome] | Failure,
    allowed: tuple[float, float],
    notes: list[str],
) -> dict[str, str]:
    what = f"{row['operation']} {row['format']} {row['backend']}"
    if isinstance(outcomes, Failure):
        notes.append(f"{what}: {outcomes}")
        return {"verdict": "failed"}
    outputs = max(outcome.outputs for outcome in outcomes)
    gradients = max(outcome.gradients for outcome in outcomes)
    right = outputs <= allowed[0] and gradients <= allowed[1]
    if not right:
        worst = max(outcomes, key=lambda o: max(o.outputs / allowed[0], o.gradients / allowed[1])).worst
        notes.append(f"{what}: wrong by {max(outputs, gradients):.1e} at worst, {worst}")
        bench.failures.append(notes[-1])
    return {
        "outputs": f"{outputs:.1e}",
        "gradients": f"{gradients:.1e}",
        "allowed": " ".join(f"{limit:.0e}" for limit in dict.fromkeys(allowed)),
        "verdict": "right" if right else "WRONG",
    }


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layouts(bench: Bench) -> dict[str, list[int]]:
    """Lengths of texts around the edges of common block sizes."""
    if bench.quick:
        return {"one text": [37], "many texts": [1, 16, 17, 5], "one-token texts": [1] * 5}
    many = [1, 2, 3, 7, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129]
    return {"one text": [1111], "many texts": many, "one-token texts": [1] * 65}


def scan_cases(bench: Bench, dtype: torch.dtype) -> Iterator[Case]:
    """Scans with and without initial states and optional inputs, on columns of wider matrices, as in the model."""
    channels, states = (24, 8) if bench.quick else (200, 16)
    for layout, lengths in layouts(bench).items():
        for initial in ("none", "shared", "own"):
            tokens, texts = sum(lengths), len(lengths)
            values = {
                "u and z": _random(tokens, 2 * channels, seed=0),
                "dt": _random(tokens, channels, seed=1) - 2,
                "A": -_random(channels, states, seed=2).exp(),
                "B and C": _random(tokens, 2 * states, seed=3),
                "D": _random(channels, seed=4),
                "dt_bias": _random(channels, seed=5),
                "state": _random(*([texts] if initial == "own" else []), channels, states, seed=6),
            }
            if initial == "none":
                del values["state"]
            if initial == "shared":  # the model passes no bias: its projection to time steps has added it
                del values["dt_bias"]
            yield Case(
                layout=f"{layout}, initial states: {initial}",
                task=Task(bench.device.type, dtype, has_initial_state=initial != "none"),
                values=values,
                run=partial(_scan, lengths),
                naive=partial(_scan_by_text, lengths),
                wide=frozenset({"dt", "A", "state"}),
            )


def _scan(lengths: list[int], backend: Backend, leaves: Values) -> list[Tensor]:
    return list(backend.run(_scan_inputs(lengths, leaves)))


def _scan_inputs(lengths: list[int], leaves: Values) -> ScanInputs:
    (u, z), (b, c) = leaves["u and z"].chunk(2, -1), leaves["B and C"].chunk(2, -1)
    state = leaves.get("state")
    if state is not None and state.ndim == 2:
        state = state.expand(len(lengths), -1, -1)
    offsets = (0, *accumulate(lengths))
    return ScanInputs(u, leaves["dt"], leaves["A"], b, c, leaves["D"], z, leaves.get("dt_bias"), state, offsets)


def _scan_by_text(lengths: list[int], leaves: Values) -> list[Tensor]:
    u, dt, a, b, c, d, z, dt_bias, state, *_ = _scan_inputs(lengths, leaves)
    states = [None] * len(lengths) if state is None else state.unbind()
    texts = zip(*(x.split(lengths) for x in (u, dt, b, c, z)), states, strict=True)
    ys, finals = zip(
        *(naive_scan(u, dt, a, b, c, d, z, dt_bias, initial) for u, dt, b, c, z, initial in texts), strict=True
    )
    return [torch.cat(ys), torch.stack(finals)]


def convolution_cases(bench: Bench, dtype: torch.dtype) -> Iterator[Case]:
    """Texts shorter and longer than the convolution's kernel, with and without a bias."""
    channels = 24 if bench.quick else 200
    for tokens, has_bias in ((1, True), (3, False), (65, True), (37 if bench.quick else 1111, True)):
        values = {"x": _random(tokens, 2 * channels, seed=0), "weight": _random(channels, 4, seed=1)}
        yield Case(
            layout=f"{tokens} tokens",
            task=Task(bench.device.type, dtype),
            values=values | ({"bias": _random(channels, seed=2)} if has_bias else {}),
            run=_convolve,
            naive=_convolve_naively,
        )


def _convolve(backend: Backend, leaves: Values) -> list[Tensor]:
    return [backend.run(leaves["x"].chunk(2, -1)[0], leaves["weight"], leaves.get("bias"))]


def _convolve_naively(leaves: Values) -> list[Tensor]:
    return [naive_convolution(leaves["x"].chunk(2, -1)[0], leaves["weight"], leaves.get("bias"))[0]]


def attention_cases(bench: Bench, dtype: torch.dtype) -> Iterator[Case]:
    """Windowed and global attention, with and without meta tokens."""
    groups, heads = 2, 10
    width, value_width = WIDTHS
    meta = 10 if bench.quick else 128
    everywhere = [(layout, meta, window) for layout in layouts(bench) for window in (40, None)]
    for layout, meta, window in [*everywhere, ("many texts", 0, 7)]:
        lengths = layouts(bench)[layout]
        rows = meta + sum(lengths)
        yield Case(
            layout=f"{layout}, {meta} meta tokens, window {window}",
            task=Task(bench.device.type, dtype, widths=WIDTHS),
            values={
                "query": _random(rows, heads, width, seed=0),
                "key": _random(rows, groups, width, seed=1),
                "value": _random(rows, groups, value_width, seed=2),
            },
            run=partial(_attend, meta, lengths, window),
            naive=partial(_attend_by_text, meta, lengths, window),
        )


def _attend(meta: int, lengths: list[int], window: int | None, backend: Backend, leaves: Values) -> list[Tensor]:
    query, key, value = leaves["query"], leaves["key"], leaves["value"]
    offsets = torch.tensor([0, *accumulate(lengths)], device=query.device)
    documents = find_documents((1, sum(lengths)), query.device, num_meta=meta, cu_seqlens=offsets)
    return [backend.run(query, key, value, documents, window)]


def _attend_by_text(meta: int, lengths: list[int], window: int | None, leaves: Values) -> list[Tensor]:
    metas, *texts = zip(*(leaves[name].split([meta, *lengths]) for name in ("query", "key", "value")), strict=True)
    outputs = [naive_attention(*metas, meta, window)] if meta else []
    for text in texts:
        whole = (torch.cat(pair) for pair in zip(metas, text, strict=True))
        outputs.append(naive_attention(*whole, meta, window)[meta:])
    return [torch.cat(outputs).flatten(1)]

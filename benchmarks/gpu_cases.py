"""The operations on random values in many layouts, with the tests' reference versions, for the GPU benchmark's checks.

The references run in float64 on the CPU, on the same values that the backends get, rounded to the backends' dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from gpu_measure import Bench
from torch import Tensor
from torch.nn.functional import silu

from hymba_tune.model.backends import Backend, Task
from hymba_tune.model.documents import Documents, find_documents
from hymba_tune.model.scan_inputs import ScanInputs
from tests.reference.naive_attention import naive_attention
from tests.reference.naive_convolution import naive_convolution
from tests.reference.naive_scan import naive_scan

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


def results(compute: Callable[[Values], list[Tensor]], leaves: Values) -> dict[str, Tensor]:
    """The outputs, and the gradients of their weighted sum with respect to every leaf."""
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    return with_gradients(compute(leaves), leaves)


def with_gradients(outputs: Sequence[Tensor], leaves: Mapping[Any, Tensor]) -> dict[str, Tensor]:
    """The outputs, and the gradients of their weighted sum with respect to the leaves that they were computed from."""
    generator = torch.Generator().manual_seed(2)
    # Weights that every dtype represents exactly, so that the reference's backward starts from the same ones.
    weights = [torch.randint(-4, 5, x.shape, generator=generator).to(x.device, x.dtype) / 4 for x in outputs]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), weights)
    named = {f"output {place}": output.detach() for place, output in enumerate(outputs)}
    return named | {f"gradient of {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of the expected values, or over 1 if these are zero; infinite for NaN."""
    expected = expected.double()
    error = ((actual.to(expected.device).double() - expected).norm() / (expected.norm().item() or 1.0)).item()
    return error if error == error else float("inf")


def _random(device: torch.device, *shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device)


def layouts(bench: Bench) -> dict[str, list[int]]:
    """Lengths of texts around the edges of common block sizes."""
    if bench.quick:
        return {"one text": [37], "many texts": [1, 16, 17, 5], "one-token texts": [1] * 5}
    many = [1, 2, 3, 7, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129]
    return {"one text": [1111], "many texts": many, "one-token texts": [1] * 65}


def scan_cases(bench: Bench, dtype: torch.dtype) -> Iterator[Case]:
    """Scans with and without initial states and optional inputs."""
    sizes = (24, 8) if bench.quick else (200, 16)
    for layout, lengths in layouts(bench).items():
        for initial in ("none", "shared", "own"):
            yield scan_case(bench.device, dtype, layout, lengths, *sizes, initial)


def scan_case(
    device: torch.device, dtype: torch.dtype, layout: str, lengths: list[int], channels: int, states: int, initial: str
) -> Case:
    """A scan on columns of wider matrices, as in the model; its initial states are none, shared or each text's own."""
    tokens, texts = sum(lengths), len(lengths)
    values = {
        "u and z": _random(device, tokens, 2 * channels, seed=0),
        "dt": _random(device, tokens, channels, seed=1) - 2,
        "A": -_random(device, channels, states, seed=2).exp(),
        "B and C": _random(device, tokens, 2 * states, seed=3),
        "D": _random(device, channels, seed=4),
        "dt_bias": _random(device, channels, seed=5),
        "state": _random(device, *([texts] if initial == "own" else []), channels, states, seed=6),
    }
    if initial == "none":
        del values["state"]
    if initial == "shared":  # the model passes no bias: its projection to time steps has added it
        del values["dt_bias"]
    return Case(
        layout=f"{layout}, initial states: {initial}",
        task=Task(device.type, dtype, has_initial_state=initial != "none"),
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


def packed_documents(meta: int, lengths: list[int], device: torch.device) -> Documents:
    """The layout of texts after meta tokens."""
    offsets = torch.tensor([0, *accumulate(lengths)], device=device)
    return find_documents((1, sum(lengths)), device, num_meta=meta, cu_seqlens=offsets)


def convolution_cases(bench: Bench, dtype: torch.dtype) -> Iterator[Case]:
    """Texts shorter and longer than the convolution's kernel, with and without a bias."""
    device, channels = bench.device, 24 if bench.quick else 200
    for tokens, has_bias in ((1, True), (3, False), (65, True), (37 if bench.quick else 1111, True)):
        values = {"x": _random(device, tokens, 2 * channels, seed=0), "weight": _random(device, channels, 4, seed=1)}
        yield Case(
            layout=f"{tokens} tokens",
            task=Task(bench.device.type, dtype),
            values=values | ({"bias": _random(device, channels, seed=2)} if has_bias else {}),
            run=_convolve,
            naive=_convolve_naively,
        )

    meta = 10 if bench.quick else 128
    for layout, lengths in layouts(bench).items():
        values = {
            "x": _random(device, meta + sum(lengths), 2 * channels, seed=0),
            "weight": _random(device, channels, 4, seed=1),
            "bias": _random(device, channels, seed=2),
        }
        yield Case(
            layout=f"{layout}, {meta} meta tokens",
            task=Task(bench.device.type, dtype),
            values=values,
            run=partial(_convolve_packed, meta, lengths),
            naive=partial(_convolve_by_text, meta, lengths),
        )


def _convolve_packed(meta: int, lengths: list[int], backend: Backend, leaves: Values) -> list[Tensor]:
    x = leaves["x"].chunk(2, -1)[0]
    documents = packed_documents(meta, lengths, x.device)
    return [backend.run.packed(x, leaves["weight"], leaves["bias"], documents, None, False)[0]]


def _convolve_by_text(meta: int, lengths: list[int], leaves: Values) -> list[Tensor]:
    metas, *texts = leaves["x"].chunk(2, -1)[0].split([meta, *lengths])
    filters = leaves["weight"], leaves["bias"]
    outputs = [naive_convolution(metas, *filters)[0]]
    outputs += [naive_convolution(torch.cat([metas, text]), *filters)[0][meta:] for text in texts]
    return [silu(torch.cat(outputs))]


def _convolve(backend: Backend, leaves: Values) -> list[Tensor]:
    return [backend.run.alone(leaves["x"].chunk(2, -1)[0], leaves["weight"], leaves.get("bias"))]


def _convolve_naively(leaves: Values) -> list[Tensor]:
    return [naive_convolution(leaves["x"].chunk(2, -1)[0], leaves["weight"], leaves.get("bias"))[0]]


def attention_cases(bench: Bench, dtype: torch.dtype) -> Iterator[Case]:
    """Windowed and global attention, with and without meta tokens."""
    device, groups, heads = bench.device, 2, 10
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
                "query": _random(device, rows, heads, width, seed=0),
                "key": _random(device, rows, groups, width, seed=1),
                "value": _random(device, rows, groups, value_width, seed=2),
            },
            run=partial(_attend, meta, lengths, window),
            naive=partial(_attend_by_text, meta, lengths, window),
        )


def _attend(meta: int, lengths: list[int], window: int | None, backend: Backend, leaves: Values) -> list[Tensor]:
    query, key, value = leaves["query"], leaves["key"], leaves["value"]
    documents = packed_documents(meta, lengths, query.device)
    return [backend.run(query, key, value, documents, window)]


def _attend_by_text(meta: int, lengths: list[int], window: int | None, leaves: Values) -> list[Tensor]:
    metas, *texts = zip(*(leaves[name].split([meta, *lengths]) for name in ("query", "key", "value")), strict=True)
    outputs = [naive_attention(*metas, meta, window)] if meta else []
    for text in texts:
        whole = (torch.cat(pair) for pair in zip(metas, text, strict=True))
        outputs.append(naive_attention(*whole, meta, window)[meta:])
    return [torch.cat(outputs).flatten(1)]

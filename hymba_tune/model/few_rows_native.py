"""Matrix products of a few rows in C++ for the CPU, which read the weights as fast as the memory gives them.

torch's products of one row in bfloat16 reach about half of the memory's bandwidth. With every further row the work on
each weight grows, so that libraries that arrange the weights anew for it, or have instructions for whole matrices, are
faster in the end: see `MOST_ROWS`.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from .backends import Task
from .few_rows_native_source import SOURCE
from .native import Arguments, Library, Rows, fields, readable, threads_for

LIBRARY = Library("few_rows", SOURCE)
MOST_ROWS = 16
"""The number of rows up to which the product is faster than torch's on a CPU with AVX512 and bfloat16."""
MOST_ROWS_BESIDE_AMX = 4
"""The same where torch multiplies matrices by AMX: up to here, the time is that of reading the weights."""
LEAST_WEIGHTS = 2**18
"""The number of weights from which the time that is saved is longer than a call takes."""
STEPS = 8
"""The time of reading a vector of weights, in the steps that `threads_for` counts."""


class _ProductArguments(Arguments):
    _fields_ = (
        *fields(ctypes.c_int64, "rows width outputs threads"),
        *fields(Rows, "x weight bias up residual y"),
    )


def native_linear(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """Compute `few_rows.multiply` on the CPU, in float32 or bfloat16."""
    given: dict[str, Any] = {"bias": None if bias is None else readable(bias)[None]}
    return _product(x, weight, **given, residual=None if residual is None else readable(residual))


def native_gate_up(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """Compute `few_rows.gate_up` on the CPU, in float32 or bfloat16."""
    return _product(x, gate, up=readable(up))


def slower_reason(task: Task) -> str | None:
    """Return why torch is preferred for a task, whose sizes are outputs, width and rows; None if it is not."""
    if not task.sizes:
        return None
    outputs, width, rows = task.sizes
    most = MOST_ROWS_BESIDE_AMX if torch.cpu.get_capabilities().get("amx_bf16") else MOST_ROWS
    if rows > most:
        return f"it is slower than torch for more than {most} rows"
    if outputs * width < LEAST_WEIGHTS:
        return f"it is slower than torch for fewer than {LEAST_WEIGHTS:,} weights"
    return None


def _product(x: Tensor, weight: Tensor, **others: Tensor | None) -> Tensor:
    x, weight = readable(x), readable(weight)
    outputs, width = weight.shape
    y = x.new_empty(len(x), outputs)
    matrices = 1 if others.get("up") is None else 2
    arguments = _ProductArguments(
        rows=len(x),
        width=width,
        outputs=outputs,
        threads=threads_for(matrices * weight.nbytes * STEPS // 64),
        x=x,
        weight=weight,
        y=y,
        **others,
    )
    LIBRARY.call("product", arguments)
    return y

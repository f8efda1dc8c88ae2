"""Matrix products of a few rows, as in a step of generation: their time is that of reading the weights.

The products read the weights of linear layers without calling the layers, where nothing would change by that.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .autocast import autocast_is_on
from .backends import Backend, Operation, Problem, Task, random_leaves
from .elementwise import gated_silu
from .few_rows_native import LIBRARY, native_gate_up, native_linear, slower_reason
from .native import DTYPES
from .one_token_triton import LEAST_ROWS, triton_gate_up
from .triton_kernels import power_of_2, triton_unavailable_reason

FEW_ROWS = 128
"""The number of rows up to which a matrix product takes as long as reading its weights."""
PLAIN: set[type] = {nn.Parameter}
"""The types of weights that are what they seem, not divided among processes, quantized or empty."""


def has_few_rows(x: Tensor) -> bool:
    """Return whether the products of this module apply: a step of generation, with products in the dtype of x."""
    return len(x) <= FEW_ROWS and not torch.is_grad_enabled() and not autocast_is_on(x.device.type)


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether nothing would change if the weights of the module were used without calling the module.

    Adapters and parametrizations have classes of their own, offloading and sharding have hooks or replace `forward`,
    and quantized or divided weights are no plain parameters. Every layer asks this for every token, so it must be fast.
    """
    own = module.__dict__
    if type(module) is not kind or own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own:
        return False
    for parameter in own["_parameters"].values():
        if type(parameter) not in PLAIN and parameter is not None:
            return False
    return True


def project(module: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """Compute a linear layer, without calling it if it is plain and x has few rows.

    Args:
        module: The layer, which may have an adapter or be quantized.
        x: ``(rows, d)``.
        residual: The residual stream ``(rows, outputs)`` that the result is added to, possibly in place, or None.

    Returns:
        ``(rows, outputs)``.
    """
    if has_few_rows(x) and is_plain(module, nn.Linear):
        weight: Tensor = module.weight  # type: ignore[assignment]
        if weight.dtype is x.dtype and (residual is None or residual.dtype is x.dtype):
            return multiply(x, weight, module.bias, residual)  # type: ignore[arg-type]
    projected: Tensor = module(x)
    return projected if residual is None else residual + projected


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """Compute the linear layer of a few rows without gradients.

    Args:
        x: ``(rows, d)``, at most `FEW_ROWS`.
        weight: ``(outputs, d)`` in x's dtype.
        bias: ``(outputs,)`` or None.
        residual: ``(rows, outputs)`` that the result is added to, possibly in place, or None.

    Returns:
        ``(rows, outputs)``.
    """
    y: Tensor = LINEAR.compute(Task.of(x, sizes=(*weight.shape, len(x))), x, weight, bias, residual)
    return y


def gate_up(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """Compute the `gated_silu` of two projections of a few rows.

    Args:
        x: ``(rows, d)``, at most `FEW_ROWS`.
        gate: The weight of the gate's projection, ``(inner, d)``.
        up: The weight of the other projection, ``(inner, d)``.

    Returns:
        ``(rows, inner)``.
    """
    # Triton's kernels have versions by the rounded number of rows, each of which is tested once.
    rows = len(x) if x.device.type == "cpu" else max(LEAST_ROWS, power_of_2(len(x)))
    y: Tensor = GATE_UP.compute(Task.of(x, sizes=(*gate.shape, rows)), x, gate, up)
    return y


def _torch_linear(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    if residual is None:
        return linear(x, weight, bias)
    total = residual if bias is None else residual.add_(bias)
    return total.addmm_(x, weight.t())


def _separate_gate_up(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    return gated_silu(linear(x, gate), linear(x, up))


def _small_linear(task: Task) -> Problem:
    """Return a problem in the sizes of the task, with a bias and a residual stream."""
    outputs, width, rows = task.sizes or (40, 96, 3)
    shapes: list[tuple[int, ...]] = [(rows, width), (outputs, width), (outputs,), (rows, outputs)]
    leaves = random_leaves(replace(task, gradients=False), shapes)
    x, weight, bias, residual = leaves
    weight = weight / width**0.5

    def compute(backend: Backend) -> tuple[Tensor, ...]:
        return backend.run(x, weight, None, None), backend.run(x, weight, bias, residual.clone())

    return Problem(compute, leaves)


def _small_gate_up(task: Task) -> Problem:
    """Return a problem in the sizes of the task."""
    inner, width, rows = task.sizes or (40, 96, 3)
    x, gate, up = random_leaves(replace(task, gradients=False), [(rows, width)] + [(inner, width)] * 2)
    return Problem(lambda backend: (backend.run(x, gate / width**0.5, up / width**0.5),), [x, gate, up])


LINEAR = Operation(
    "linear",
    [
        Backend(
            "native",
            native_linear,
            ("cpu",),
            DTYPES,
            unavailable_reason=LIBRARY.unavailable_reason,
            slower_reason=slower_reason,
        ),
        Backend("torch", _torch_linear),
    ],
    plain="torch",
    problem=_small_linear,
    trains=False,
)
"""The backends of `multiply`, the fastest first."""
GATE_UP = Operation(
    "gate_up",
    [
        Backend(
            "triton",
            triton_gate_up,
            ("cuda",),
            (torch.bfloat16, torch.float16),
            needs_self_test=True,
            unavailable_reason=triton_unavailable_reason,
        ),
        Backend(
            "native",
            native_gate_up,
            ("cpu",),
            DTYPES,
            unavailable_reason=LIBRARY.unavailable_reason,
            slower_reason=slower_reason,
        ),
        Backend("separate", _separate_gate_up),
    ],
    plain="separate",
    problem=_small_gate_up,
    trains=False,
)
"""The backends of `gate_up`, the fastest first."""

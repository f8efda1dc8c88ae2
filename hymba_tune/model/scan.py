"""The selective scan of Mamba-1, over packed texts.

    s_t = exp(dt_t A) * s_{t-1} + (dt_t u_t) B_t^T        y_t = s_t C_t + D * u_t        (arXiv 2312.00752, section 3)

Glossary: M meta tokens, T tokens, S texts, E channels, N size of a channel's state; u input, dt time step, z gate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from .backends import GPU_DTYPES, Backend, Operation, Problem, Task, random_leaves
from .documents import Documents
from .native import DTYPES
from .scan_inputs import ScanInputs
from .scan_mamba_ssm import mamba_ssm_scan, mamba_ssm_unavailable_reason
from .scan_native import LIBRARY, native_scan
from .scan_torch import chunked_recurrence
from .scan_triton import triton_scan, triton_unavailable_reason


def packed_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    documents: Documents,
    states: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Scan the meta tokens and the texts, each text continued from the meta tokens or a cache.

    Args:
        u: ``(M + T, E)``; ``dt``, ``B``, ``C``, ``z`` have as many rows.
        dt: Time steps before softplus.
        A: ``(E, N)``.
        B: Input projections ``(M + T, N)``.
        C: Output projections ``(M + T, N)``.
        D: ``(E,)``.
        z: Gates.
        documents: The layout of the packed texts.
        states: The cached states ``(S, E, N)``; None if u contains the meta tokens.

    Returns:
        ``(M + T, E)`` in u's dtype, and the final state of each text, ``(S, E, N)`` in float32.
    """
    if states is not None or not documents.num_meta:
        return selective_scan(u, dt, A, B, C, D, z, initial_state=states, cu_seqlens=documents.starts)

    def scan_behind_meta(backend: Backend) -> tuple[Tensor, Tensor]:
        return _scan_behind_meta(backend, u, dt, A, B, C, D, z, documents)

    return SCAN.attempt(Task.of(u, dt, A, B, C, D, z), scan_behind_meta)


def _scan_behind_meta(
    backend: Backend,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    documents: Documents,
) -> tuple[Tensor, Tensor]:
    """Scan the meta tokens and the texts that continue from them."""
    meta = documents.num_meta
    starts = documents.starts
    if backend.fuses_meta_prefix:
        offsets = (0, *(meta + start for start in starts))
        y, states = backend.run(ScanInputs(u, dt, A, B, C, D, z, None, None, offsets, fuses_meta_prefix=True))
        return y, states[1:].clone()  # without a copy, a cache would hold the states of the meta tokens as well
    if not backend.initial_state:
        copies, places, offsets = documents.behind_meta
        u, dt, B, C, z = (x[copies] for x in (u, dt, B, C, z))
        y, states = selective_scan(u, dt, A, B, C, D, z, cu_seqlens=offsets)
        return y[places], states

    rows = [meta, starts[-1]]
    (u_meta, u), (dt_meta, dt), (B_meta, B), (C_meta, C), (z_meta, z) = (x.split(rows) for x in (u, dt, B, C, z))
    y_meta, state = selective_scan(u_meta, dt_meta, A, B_meta, C_meta, D, z_meta)
    y, states = selective_scan(u, dt, A, B, C, D, z, initial_state=state[0], cu_seqlens=starts)
    return torch.cat([y_meta, y]), states


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the selective scan, differentiable in all tensors.

    Args:
        u: ``(T, E)``, any float dtype. The state is float32, or float64 if u is.
        dt: ``(T, E)``; ``softplus(dt + dt_bias)`` is the time step.
        A: ``(E, N)``, negative.
        B: ``(T, N)``.
        C: ``(T, N)``.
        D: ``(E,)`` weight of the skip connection.
        z: ``(T, E)`` gate; the output is multiplied by ``silu(z)``.
        dt_bias: ``(E,)``.
        initial_state: ``(E, N)`` for all texts or ``(S, E, N)``. The default is zeros.
        cu_seqlens: ``(S + 1,)`` offsets of the texts. The default is one text. A tensor on a GPU synchronizes with it.
        backend: A key of ``SCAN.backends``, or "auto" for the fastest usable one. The default is the choice of
            `use_kernels`.

    Returns:
        y ``(T, E)`` in u's dtype and the final state ``(S, E, N)``.

    Raises:
        ValueError: If a shape or device does not match u, or the backend is unknown or does not support these tensors.
    """
    offsets = _checked_offsets(u, cu_seqlens)
    texts = len(offsets) - 1
    if initial_state is not None and initial_state.ndim == 2:
        initial_state = initial_state.expand(texts, -1, -1)

    tokens, channels = u.shape
    states = A.shape[-1]
    _check(u.device, (tokens, channels), dt=dt, z=z)
    _check(u.device, (tokens, states), B=B, C=C)
    _check(u.device, (channels, states), A=A)
    _check(u.device, (channels,), D=D, dt_bias=dt_bias)
    _check(u.device, (texts, channels, states), initial_state=initial_state)

    inputs = ScanInputs(u, dt, A, B, C, D, z, dt_bias, initial_state, offsets)
    task = Task.of(*inputs.tensors, has_initial_state=initial_state is not None)
    y, final = SCAN.compute(task, inputs, name=backend)
    return y, final


def _checked_offsets(u: Tensor, cu_seqlens: Tensor | Sequence[int] | None) -> tuple[int, ...]:
    if cu_seqlens is None:
        return 0, u.shape[0]
    offsets = tuple(cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else cu_seqlens)
    decreases = any(end < start for start, end in pairwise(offsets))
    if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != u.shape[0] or decreases:
        raise ValueError(f"cu_seqlens is {[*offsets]}; expected offsets that rise from 0 to the {u.shape[0]} rows of u")
    return offsets


def _check(device: torch.device, shape: tuple[int, ...], **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {shape}")
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}; expected {device}, where u is")


Scan = Callable[[ScanInputs], tuple[Tensor, Tensor]]
Recurrence = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, list[int]], tuple[Tensor, Tensor]]


def _unfused(recurrence: Recurrence) -> Scan:
    """Make a backend from a recurrence: add softplus, skip connection and gate, in float32 or float64."""

    def scan(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
        dtype = inputs.u.dtype
        wide = torch.promote_types(dtype, torch.float32)
        u, dt, A, B, C = (x.to(wide) for x in inputs[:5])
        D, z, dt_bias, state = (None if x is None else x.to(wide) for x in inputs[5:9])
        delta = softplus(dt if dt_bias is None else dt + dt_bias)
        state = A.new_zeros(len(inputs.lengths), *A.shape) if state is None else state
        y, final = recurrence(u, delta, A, B, C, state, inputs.lengths)
        y = y if D is None else torch.addcmul(y, u, D)
        y = y if z is None else y * silu(z)
        return y.to(dtype), final

    return scan


def _recurrence(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, lengths: list[int]
) -> tuple[Tensor, Tensor]:
    """Compute the recurrence as written above, one token at a time."""
    outputs, finals = [], []
    tokens = [iter(x.unbind(0)) for x in (u, delta, B, C)]
    for initial, length in zip(state.unbind(0), lengths, strict=True):
        s = initial
        for _ in range(length):
            u_t, delta_t, B_t, C_t = (next(x) for x in tokens)
            s = torch.exp(delta_t[:, None] * A) * s + (delta_t * u_t)[:, None] * B_t
            outputs.append((s * C_t).sum(-1))  # autocast would lower the precision of a matrix product's backward
        finals.append(s)
    return torch.stack(outputs) if outputs else torch.empty_like(u), torch.stack(finals)


def _small_problem(task: Task) -> Problem:
    """Return a problem of two texts, one of several chunks, with all arguments, in the dtypes of a model.

    Without an initial state the second text continues from the first one, as texts do from the meta tokens.
    """
    first, tokens, channels, states = 40, 190, 48, 16
    u, z, B, C = random_leaves(task, [(tokens, channels)] * 2 + [(tokens, states)] * 2)
    wide = replace(task, dtype=torch.promote_types(task.dtype, torch.float32))
    shapes = [(tokens, channels), (channels, states), (channels,), (channels,), (2, channels, states)]
    dt, rates, D, dt_bias, state = random_leaves(wide, shapes)

    def compute(backend: Backend) -> tuple[Tensor, ...]:
        inputs = ScanInputs(u, dt, -rates.exp(), B, C, D, z, dt_bias, None, (0, first, tokens))
        if task.has_initial_state:
            y, final = backend.run(inputs._replace(state=state))
            return y, final
        if backend.fuses_meta_prefix:
            y, final = backend.run(inputs._replace(fuses_meta_prefix=True))
            return y, final
        copies = torch.tensor([*range(first), *range(tokens)], device=u.device)
        repeated: dict[str, Any] = {name: x[copies] for name, x in (("u", u), ("dt", dt), ("B", B), ("C", C), ("z", z))}
        y, final = backend.run(inputs._replace(**repeated, offsets=(0, first, first + tokens)))
        return y[first:], final

    leaves = [u, dt, rates, B, C, D, z, dt_bias]
    return Problem(compute, [*leaves, state] if task.has_initial_state else leaves)


SCAN = Operation(
    "scan",
    [
        Backend(
            "native",
            native_scan,
            ("cpu",),
            DTYPES,
            fuses_meta_prefix=True,
            unavailable_reason=LIBRARY.unavailable_reason,
        ),
        Backend(
            "triton",
            triton_scan,
            ("cuda",),
            GPU_DTYPES,
            fuses_meta_prefix=True,
            needs_self_test=True,
            unavailable_reason=triton_unavailable_reason,
        ),
        Backend(
            "mamba_ssm",
            mamba_ssm_scan,
            ("cuda",),
            GPU_DTYPES,
            initial_state=False,
            needs_self_test=True,
            unavailable_reason=mamba_ssm_unavailable_reason,
        ),
        Backend("torch", _unfused(chunked_recurrence)),
        Backend("reference", _unfused(_recurrence)),
    ],
    plain="torch",
    problem=_small_problem,
)
"""The scan backends, the fastest first."""

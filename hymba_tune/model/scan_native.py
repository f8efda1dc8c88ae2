"""The selective scan in C++ for the CPU: compiled on first use, kept in the user's cache, called through ctypes.

Softplus, skip connection and gate are inside; inputs are read where they lie, in float32 or bfloat16, and the state is
float32. The backward is written by hand and keeps one state for every `CHUNK` tokens.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .scan_native_source import SOURCE

DTYPES = (torch.float32, torch.bfloat16)
CHUNK = 16
"""Steps between two states that the backward starts from."""
GROUP = 64
"""Channels a thread takes at a time."""
FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
    *(f"-DCHUNK={CHUNK}", f"-DGROUP={GROUP}"),
)
COMPILERS = ("g++", "clang++", "c++")


def native_unavailable() -> str | None:
    """Why the native scan cannot run on this machine, or None if it can; compiles it the first time."""
    loaded = _load()
    return loaded if isinstance(loaded, str) else None


def native_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor | None,
    lengths: list[int],
) -> tuple[Tensor, Tensor]:
    """The scan of `selective_scan`, on texts of these lengths.

    Args:
        u: ``(T, E)``, float32 or bfloat16, on the CPU.
        dt: ``(T, E)``, before softplus.
        A: ``(E, N)``.
        B: ``(T, N)``.
        C: ``(T, N)``.
        D: ``(E,)`` or None.
        z: ``(T, E)`` or None.
        dt_bias: ``(E,)`` or None.
        state: ``(S, E, N)``, which may be expanded from ``(E, N)``, or None for zeros.
        lengths: Tokens of each of the S texts.

    Returns:
        y ``(T, E)`` in u's dtype and the final state ``(S, E, N)`` in float32.

    Raises:
        RuntimeError: If there is no native scan on this machine.
    """
    u, dt, B, C = (_readable(x) for x in (u, dt, B, C))
    A, D, dt_bias = (None if x is None else x.float().contiguous() for x in (A, D, dt_bias))
    z = None if z is None else _readable(z)
    if state is not None and not (state := state.float())[:1].is_contiguous():
        state = state.contiguous()
    y, final = _NativeScan.apply(u, dt, A, B, C, D, z, dt_bias, state, lengths, torch.is_grad_enabled())
    return y, final


def _readable(x: Tensor) -> Tensor:
    """In a dtype the C++ reads, and with rows that are contiguous: columns of a wider matrix are."""
    x = x if x.dtype in DTYPES else x.float()
    return x if x.stride(-1) == 1 else x.contiguous()


class _NativeScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        dt_bias: Tensor | None,
        state: Tensor | None,
        lengths: list[int],
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        channels, states = A.shape
        kept = None
        if keep and any(ctx.needs_input_grad):
            chunks = sum(-(-length // CHUNK) for length in lengths)
            kept = A.new_empty(chunks, -(-channels // GROUP) * GROUP, states)
        y = u.new_empty(u.shape)
        final = A.new_empty(len(lengths), channels, states)
        stride = 0 if state is None else state.stride(0)
        inputs = {"u": u, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias}
        _run("forward", lengths, **inputs, initial=state, initial_stride=stride, kept=kept, y=y, final=final)
        ctx.save_for_backward(*inputs.values(), kept)
        ctx.lengths = lengths
        ctx.has_state = state is not None
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
        u, dt, A, B, C, D, z, dt_bias, kept = ctx.saved_tensors
        inputs = {"u": u, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias}
        grads = {
            name: None if x is None else x.new_empty(x.shape, dtype=torch.float32 if name in "BC" else x.dtype)
            for name, x in inputs.items()
        }
        d_state = A.new_empty(len(ctx.lengths), *A.shape)
        _run(
            "backward",
            ctx.lengths,
            **inputs,
            **{f"d_{name}" if name.startswith("dt") else f"d{name}": grad for name, grad in grads.items()},
            dy=None if dy is None else _readable(dy),
            d_final=None if d_final is None else d_final.contiguous(),
            d_initial=d_state,
            kept=kept,
            dB_groups=(groups := A.new_empty(2, -(-u.shape[1] // GROUP), *B.shape))[0],
            dC_groups=groups[1],
        )
        grads["B"], grads["C"] = grads["B"].to(B.dtype), grads["C"].to(C.dtype)
        return *grads.values(), d_state if ctx.has_state else None, None, None


class _Rows(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("stride", ctypes.c_int64), ("bf16", ctypes.c_int64))


def _fields(names: str, kind: type) -> Iterator[tuple[str, type]]:
    return ((name, kind) for name in names.split())


class _Scan(ctypes.Structure):
    """The C++'s struct of the same name."""

    _fields_ = (
        *_fields("texts E N threads", ctypes.c_int64),
        *_fields("offsets", ctypes.c_void_p),
        *_fields("u dt B C z y dy du d_dt dz", _Rows),
        *_fields("A D dt_bias initial", ctypes.c_void_p),
        *_fields("initial_stride", ctypes.c_int64),
        *_fields("final kept d_final dA dD d_dt_bias d_initial dB dC dB_groups dC_groups", ctypes.c_void_p),
    )


def _run(function: str, lengths: list[int], *, A: Tensor, **arguments: Tensor | int | None) -> None:
    library = _load()
    if isinstance(library, str):
        raise RuntimeError(f"the native scan cannot run: {library}")
    offsets = (ctypes.c_int64 * (len(lengths) + 1))(0, *accumulate(lengths))
    scan = _Scan(len(lengths), *A.shape, torch.get_num_threads(), ctypes.addressof(offsets), A=A.data_ptr())
    kinds = dict(_Scan._fields_)
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            address = value.data_ptr()
            rows = kinds[name] is _Rows
            setattr(scan, name, _Rows(address, value.stride(0), value.dtype == torch.bfloat16) if rows else address)
        elif value is not None:
            setattr(scan, name, value)
    getattr(library, function)(ctypes.byref(scan))


@cache
def _load() -> ctypes.CDLL | str:
    """The compiled library, or why there is none."""
    command = shlex.split(os.environ.get("CXX", "")) or [next(filter(shutil.which, COMPILERS), "")]
    if not shutil.which(command[0]):
        return f"no C++ compiler was found ($CXX, {', '.join(COMPILERS)})"
    try:
        return ctypes.CDLL(str(_compiled(command)))
    except subprocess.CalledProcessError as error:
        return f"{shlex.join(command)} failed: {error.stderr.strip()}"
    except OSError as error:
        return f"{shlex.join(command)}: {error}"


def _compiled(command: list[str]) -> Path:
    """The library for this source, compiler and CPU: from the cache, or compiled into it."""
    native = [*command, *FLAGS, "-march=native"]
    # The macros a compiler predefines name its version and every instruction set of the CPU.
    macros = _output([*native, "-dM", "-E", "-x", "c++", os.devnull])
    key = hashlib.sha256("\0".join([SOURCE, *native, macros]).encode()).hexdigest()[:16]
    folder = _cache_folder()
    library = folder / f"scan-{key}.so"
    if not library.exists():
        # Another process may be at the same: each writes its own file, and the last rename wins.
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            source, built = Path(scratch, "scan.cpp"), Path(scratch, "scan.so")
            source.write_text(SOURCE)
            _output([*native, str(source), "-o", str(built)])
            built.replace(library)
    return library


def _output(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _cache_folder() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hymba-tune"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="hymba-tune-"))

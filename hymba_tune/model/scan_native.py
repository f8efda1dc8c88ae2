"""The selective scan in C++ for the CPU: compiled on first use, kept in the user's cache, called through ctypes.

Softplus, skip connection and gate are inside; inputs are read where they lie, in float32 or bfloat16, and the state is
float32. The backward is written by hand and keeps one state for every `CHUNK` tokens.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .scan_inputs import ScanInputs
from .scan_native_source import SOURCE

DTYPES = (torch.float32, torch.bfloat16)
INPUTS = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias")
CHUNK = 16
"""Steps between two states that the backward starts from."""
GROUP = 64
"""Channels a thread takes at a time."""
THREAD_WORTH = 2**17
"""Elements of ``(T, E, N)`` that it is worth starting another thread for."""
FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-pthread"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
    *(f"-DCHUNK={CHUNK}", f"-DGROUP={GROUP}"),
)
COMPILERS = ("g++", "clang++", "c++")


def native_missing() -> str | None:
    """Why the native scan cannot run on this machine, or None if it can; compiles it the first time."""
    loaded = _load()
    return loaded if isinstance(loaded, str) else None


def native_scan(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """The scan of `selective_scan` on the CPU, in float32 or bfloat16.

    Returns:
        y ``(T, E)`` in u's dtype and the final state ``(S, E, N)`` in float32.

    Raises:
        RuntimeError: If there is no native scan on this machine.
    """
    u, dt, A, B, C, D, z, dt_bias, state, _ = inputs
    u, dt, B, C = (_readable(x) for x in (u, dt, B, C))
    z = None if z is None else _readable(z)
    A = A.float().contiguous()
    D, dt_bias = (None if x is None else x.float().contiguous() for x in (D, dt_bias))
    if state is not None:
        state = state.float()
        state = state if state[:1].is_contiguous() else state.contiguous()
    y, final = _NativeScan.apply(u, dt, A, B, C, D, z, dt_bias, state, inputs.offsets, torch.is_grad_enabled())
    return y, final


def _readable(x: Tensor) -> Tensor:
    """In a dtype the C++ reads, and with contiguous rows, which columns of a wider matrix have as well."""
    x = x if x.dtype in DTYPES else x.float()
    return x if x.stride(-1) == 1 else x.contiguous()


class _NativeScan(torch.autograd.Function):
    """The C++ under autograd; ``differentiable`` is whether a backward may come."""

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
        offsets: tuple[int, ...],
        differentiable: bool,
    ) -> tuple[Tensor, Tensor]:
        kept = None
        if differentiable and any(ctx.needs_input_grad):
            chunks = sum(-(-(end - start) // CHUNK) for start, end in pairwise(offsets))
            kept = A.new_empty(chunks, _groups(u) * GROUP, A.shape[1])
        y = u.new_empty(u.shape)
        final = A.new_empty(len(offsets) - 1, *A.shape)
        inputs = (u, dt, A, B, C, D, z, dt_bias)
        named = dict(zip(INPUTS, inputs, strict=True))
        stride = 0 if state is None else state.stride(0)
        _call("forward", A.shape, offsets, **named, initial=state, initial_stride=stride, kept=kept, y=y, final=final)
        ctx.save_for_backward(*inputs, kept)
        ctx.texts = offsets, state is not None
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
        *inputs, kept = ctx.saved_tensors
        offsets, has_state = ctx.texts
        u, _, A, B, *_ = inputs
        grads = [None if x is None else x.new_empty(x.shape) for x in inputs]
        d_state = A.new_empty(len(offsets) - 1, *A.shape)
        dB_groups, dC_groups = A.new_empty(2, _groups(u), *B.shape)
        _call(
            "backward",
            A.shape,
            offsets,
            **dict(zip(INPUTS, inputs, strict=True)),
            **{f"d{name}": grad for name, grad in zip(INPUTS, grads, strict=True)},
            kept=kept,
            dy=None if dy is None else _readable(dy),
            d_final=None if d_final is None else d_final.contiguous(),
            d_initial=d_state,
            dB_groups=dB_groups,
            dC_groups=dC_groups,
        )
        return *grads, d_state if has_state else None, None, None


def _groups(u: Tensor) -> int:
    return -(-u.shape[1] // GROUP)


class _Rows(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("stride", ctypes.c_int64), ("bf16", ctypes.c_int64))


def _fields(names: str, kind: type) -> Iterator[tuple[str, type]]:
    return ((name, kind) for name in names.split())


class _Scan(ctypes.Structure):
    """The C++'s struct of the same name."""

    _fields_ = (
        *_fields("texts E N threads", ctypes.c_int64),
        *_fields("offsets", ctypes.c_void_p),
        *_fields("u dt B C z y dy du ddt dB dC dz", _Rows),
        *_fields("A D dt_bias initial", ctypes.c_void_p),
        *_fields("initial_stride", ctypes.c_int64),
        *_fields("final kept d_final dA dD ddt_bias d_initial dB_groups dC_groups", ctypes.c_void_p),
    )


def _call(function: str, shape: torch.Size, offsets: tuple[int, ...], **arguments: Tensor | int | None) -> None:
    """Run ``forward`` or ``backward`` of the library on ``(E, N)`` states; None is a null pointer."""
    if any(isinstance(x, Tensor) and x.untyped_storage().device.type == "meta" for x in arguments.values()):
        return  # a fake tensor: whoever made it asks for shapes, and there is nothing to read
    library = _load()
    if isinstance(library, str):
        raise RuntimeError(f"the native scan cannot run: {library}")
    texts = (ctypes.c_int64 * len(offsets))(*offsets)
    threads = min(torch.get_num_threads(), 1 + offsets[-1] * shape.numel() // THREAD_WORTH)
    scan = _Scan(len(offsets) - 1, *shape, threads, ctypes.addressof(texts))
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            address = value.data_ptr()
            rows = isinstance(getattr(scan, name), _Rows)
            setattr(scan, name, _Rows(address, value.stride(0), value.dtype == torch.bfloat16) if rows else address)
        elif value is not None:
            setattr(scan, name, value)
    getattr(library, function)(ctypes.byref(scan))


@cache
def _load() -> ctypes.CDLL | str:
    """The compiled library, or why there is none."""
    try:
        command = shlex.split(os.environ.get("CXX", "")) or [next(filter(shutil.which, COMPILERS), COMPILERS[0])]
        return ctypes.CDLL(str(_compiled(command)))
    except FileNotFoundError as error:
        return f"no C++ compiler: {error.filename} was not found; install g++ or clang++, or name one in $CXX"
    except subprocess.CalledProcessError as error:
        return f"{shlex.join(error.cmd)} failed: {error.stderr.strip()}"
    except (OSError, ValueError) as error:
        return str(error)


def _compiled(command: list[str]) -> Path:
    """The library for this source, compiler and CPU: from the cache, or compiled into it."""
    # The macros that a compiler predefines name its version and every instruction set of the CPU.
    macros = _output([*command, *FLAGS, "-dM", "-E", "-x", "c++", os.devnull])
    key = hashlib.sha256("\0".join([SOURCE, *command, *FLAGS, macros]).encode()).hexdigest()[:16]
    folder = _cache_folder()
    library = folder / f"scan-{key}.so"
    if not library.exists():
        # Other processes may be compiling it too: each has a folder of its own, and a rename cannot be seen half done.
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            source, built = Path(scratch, "scan.cpp"), Path(scratch, "scan.so")
            source.write_text(SOURCE)
            _output([*command, *FLAGS, str(source), "-o", str(built)])
            built.replace(library)
    return library


def _output(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, errors="replace").stdout


def _cache_folder() -> Path:
    """The user's cache, or where that cannot be written a folder that goes when the process ends."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "hymba-tune")
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        folder = Path(tempfile.mkdtemp(prefix="hymba-tune-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder

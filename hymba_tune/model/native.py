"""C++ for the CPU: compiled on first use, stored in the user's cache folder, and called through ctypes."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .native_cache import cache_folder, find_libraries, store_library

DTYPES = (torch.float32, torch.bfloat16)
"""The dtypes that the C++ reads and writes; it computes in float32."""
THREAD_WORTH = 2**17
"""The number of steps, in the inner loop over vectors, that justify another thread."""
FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-pthread"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
)
COMPILERS = ("g++", "clang++", "c++")


class View(ctypes.Structure):
    """The memory of a tensor whose last dimension is contiguous; a C++ struct has the same name."""

    @classmethod
    def of(cls, tensor: Tensor) -> View:
        """Return the view of a tensor that has one of `DTYPES` and as many dimensions as the view."""
        return cls(_address(tensor), *tensor.stride()[:-1], tensor.dtype == torch.bfloat16)


class Rows(View):
    """A view of ``(rows, width)``."""

    _fields_ = (("data", ctypes.c_void_p), ("stride", ctypes.c_int64), ("bf16", ctypes.c_int64))


class Grid(View):
    """A view of ``(rows, heads, width)``."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("row", ctypes.c_int64),
        ("head", ctypes.c_int64),
        ("bf16", ctypes.c_int64),
    )


class Arguments(ctypes.Structure):
    """The arguments of a function of a library; a C++ struct has the same fields.

    Args:
        **values: The values by field. A tensor is converted to the type of its field, a view or a pointer. A value that
            is None or missing becomes null.
    """

    def __init__(self, **values: Any) -> None:
        super().__init__()
        types = _field_types(type(self))
        self.tensors: dict[str, Tensor] = {}  # keeps them alive while the C++ reads them
        for name, value in values.items():
            kind: type = type(value)
            if _is_a(kind, Tensor):
                self.tensors[name] = value
                value = _address(value) if types[name] is ctypes.c_void_p else types[name].of(value)
            if value is not None:
                setattr(self, name, value)


@cache
def _field_types(structure: type[Arguments]) -> dict[str, Any]:
    return dict(structure._fields_)  # type: ignore[arg-type]


def _address(tensor: Tensor) -> int:
    return 0 if _is_a(type(tensor), FakeTensor) else tensor.data_ptr()


@cache
def _is_a(kind: type, wanted: type) -> bool:
    return issubclass(kind, wanted)  # kept, because tensors make `isinstance` slow


def fields(field_type: type, names: str) -> tuple[tuple[str, type], ...]:
    """Return fields of one type for a structure.

    Args:
        field_type: The type of the fields.
        names: The names of the fields, separated by spaces.
    """
    return tuple((name, field_type) for name in names.split())


def readable(x: Tensor) -> Tensor:
    """Return x in a dtype that the C++ reads and with contiguous rows; it may be columns of a wider matrix."""
    x = x if x.dtype in DTYPES else x.float()
    return x if x.stride(-1) == 1 else x.contiguous()


def threads_for(work: int) -> int:
    """Return the number of threads for a number of steps; see `THREAD_WORTH`."""
    return min(torch.get_num_threads(), 1 + work // THREAD_WORTH)


class Library:
    """A C++ source and the shared library compiled from it.

    Args:
        name: The name of the library, with which its file name begins.
        source: The C++ source.
        **constants: The values of the macros in the source.
    """

    def __init__(self, name: str, source: str, **constants: int) -> None:
        self.name = name
        self._source = source
        self._flags = (*FLAGS, *(f"-D{constant}={value}" for constant, value in constants.items()))
        self.load = cache(self._load)

    def unavailable_reason(self) -> str | None:
        """Return why the library cannot run on this machine, or None if it can. The first call compiles it."""
        library = self.load()
        return library if isinstance(library, str) else None

    def call(self, function: str, arguments: Arguments) -> None:
        """Run a function of the library. With fake tensors it does nothing, since their callers need shapes only.

        Args:
            function: The name of the function.
            arguments: The arguments of the function.

        Raises:
            RuntimeError: If the library cannot run on this machine, or a tensor has no memory to read.
        """
        tensors = arguments.tensors
        if any(_is_a(type(tensor), FakeTensor) for tensor in tensors.values()):
            return
        for name, tensor in tensors.items():
            if not tensor.data_ptr() and tensor.numel():
                raise RuntimeError(
                    f"the native {self.name} cannot read {name!r}: a tensor of shape {tuple(tensor.shape)} on "
                    f"{tensor.device} has no memory, for example a weight that is offloaded, sharded or not loaded "
                    "yet; load it, or call the module that owns it"
                )
        library = self.load()
        if isinstance(library, str):
            raise RuntimeError(f"the native {self.name} cannot run: {library}")
        getattr(library, function)(ctypes.byref(arguments))

    def _load(self) -> ctypes.CDLL | str:
        """Return the compiled library, or why there is none."""
        try:
            # On Windows a backslash separates folders.
            given = shlex.split(os.environ.get("CXX", ""), posix=os.name == "posix")
            command = given or [next(filter(shutil.which, COMPILERS), COMPILERS[0])]
            library = self._opened(command)
        except FileNotFoundError:
            return f"no C++ compiler: {command[0]} was not found; install g++ or clang++, or name one in $CXX"
        except subprocess.CalledProcessError as error:
            return f"{shlex.join(error.cmd)} failed: {error.stderr.strip()}"
        except (OSError, ValueError, AttributeError) as error:  # AttributeError: a function is missing
            return str(error)
        library.share_threads(_torch_threads())
        return library

    def _opened(self, command: list[str]) -> ctypes.CDLL:
        """Return the library for this source, compiler and CPU, compiled unless the cache contains it."""
        # The predefined macros of a compiler name its version and every instruction set of the CPU.
        macros = _output([*command, *self._flags, "-dM", "-E", "-x", "c++", os.devnull])
        key = hashlib.sha256("\0".join([self._source, *command, *self._flags, macros]).encode()).hexdigest()[:16]
        folder, stem = cache_folder(), f"{self.name}-{key}"
        for path in find_libraries(folder, stem):
            with suppress(OSError, AttributeError):  # a library that cannot be used counts as missing
                return self._checked(path)
        # Several processes may compile it at once: each has its own folder, and a rename is atomic.
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            source, built = Path(scratch, f"{self.name}.cpp"), Path(scratch, f"{self.name}.so")
            source.write_text(self._source, encoding="utf-8")
            _output([*command, *self._flags, str(source), "-o", str(built)])
            return self._checked(store_library(built, folder, stem))

    def _checked(self, path: Path) -> ctypes.CDLL:
        """Open a library.

        Raises:
            OSError: If it is not one.
            AttributeError: If a function of the source is missing.
        """
        library = ctypes.CDLL(str(path))
        for function in re.findall(r'extern "C" void (\w+)\(', self._source):
            getattr(library, function)
        return library


def _torch_threads() -> ctypes.c_void_p | None:
    """Return the function of GNU OpenMP that runs a function in every thread, if torch has loaded it, as on Linux.

    OpenMP threads spin for a while after they worked for torch, so that other threads would have to wait for a core.
    """
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p)
    except (OSError, AttributeError, TypeError):  # TypeError: on Windows no handle covers all loaded libraries
        return None


def _output(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, errors="replace").stdout

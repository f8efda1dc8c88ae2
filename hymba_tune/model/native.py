"""C++ for the CPU: compiled on first use, kept in the user's cache, called through ctypes."""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

DTYPES = (torch.float32, torch.bfloat16)
"""What the C++ reads and writes; it computes in float32."""
THREAD_WORTH = 2**17
"""Steps of a vector's innermost arithmetic that it is worth starting another thread for."""
FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-pthread"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
)
COMPILERS = ("g++", "clang++", "c++")


class View(ctypes.Structure):
    """Where a tensor lies; the C++'s struct of the same name. The last dimension is contiguous."""

    @classmethod
    def of(cls, tensor: Tensor) -> View:
        """A tensor in one of `DTYPES`, of as many dimensions as the kind of view has."""
        return cls(_address(tensor), *tensor.stride()[:-1], tensor.dtype == torch.bfloat16)


class Rows(View):
    """``(rows, width)``."""

    _fields_ = (("data", ctypes.c_void_p), ("stride", ctypes.c_int64), ("bf16", ctypes.c_int64))


class Grid(View):
    """``(rows, heads, width)``."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("row", ctypes.c_int64),
        ("head", ctypes.c_int64),
        ("bf16", ctypes.c_int64),
    )


class Arguments(ctypes.Structure):
    """What a function of a library takes: the C++'s struct of the same name.

    Args:
        **values: By field; a tensor becomes what the field is, a view or a pointer. What is None or not given is null.
    """

    def __init__(self, **values: Any) -> None:
        kinds = dict(self._fields_)  # type: ignore[arg-type]
        self.values = values  # kept: the C++ reads them where they lie
        super().__init__(**{name: _as(kinds[name], value) for name, value in values.items() if value is not None})


def _as(kind: Any, value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return kind.of(value) if issubclass(kind, View) else _address(value)


def _address(tensor: Tensor) -> int:
    return 0 if isinstance(tensor, FakeTensor) else tensor.data_ptr()


def fields(kind: type, names: str) -> tuple[tuple[str, type], ...]:
    """Fields of a structure, all of one kind."""
    return tuple((name, kind) for name in names.split())


def readable(x: Tensor) -> Tensor:
    """In a dtype the C++ reads, and with contiguous rows, which columns of a wider matrix have as well."""
    x = x if x.dtype in DTYPES else x.float()
    return x if x.stride(-1) == 1 else x.contiguous()


def threads_for(work: int) -> int:
    """How many threads that many steps are worth."""
    return min(torch.get_num_threads(), 1 + work // THREAD_WORTH)


class Library:
    """Some C++ and what is compiled from it.

    Args:
        name: Begins the name of the file.
        source: The C++.
        constants: What the source takes as macros.
    """

    def __init__(self, name: str, source: str, **constants: int) -> None:
        self.name, self._source = name, source
        self._flags = (*FLAGS, *(f"-D{constant}={value}" for constant, value in constants.items()))
        self.load = cache(self._load)

    def unavailable_reason(self) -> str | None:
        """Why it cannot run on this machine, or None if it can; compiles it the first time."""
        loaded = self.load()
        return loaded if isinstance(loaded, str) else None

    def call(self, function: str, arguments: Arguments) -> None:
        """Run a function of the library. With fake tensors it returns at once: whoever made those asks for shapes.

        Raises:
            RuntimeError: If the library cannot run on this machine, or a tensor has no memory to read.
        """
        if any(isinstance(value, FakeTensor) for value in arguments.values.values()):
            return
        for name, value in arguments.values.items():
            if isinstance(value, Tensor) and value.numel() and not value.data_ptr():
                raise RuntimeError(
                    f"the native {self.name} cannot read {name!r}: a tensor of shape {tuple(value.shape)} on "
                    f"{value.device} has no memory, such as a weight that is offloaded, sharded or not loaded yet; "
                    "load it, or call the module that owns it"
                )
        library = self.load()
        if isinstance(library, str):
            raise RuntimeError(f"the native {self.name} cannot run: {library}")
        getattr(library, function)(ctypes.byref(arguments))

    def _load(self) -> ctypes.CDLL | str:
        """The compiled library, or why there is none."""
        try:
            command = shlex.split(os.environ.get("CXX", "")) or [next(filter(shutil.which, COMPILERS), COMPILERS[0])]
            library = ctypes.CDLL(str(self._compiled(command)))
        except FileNotFoundError as error:
            return f"no C++ compiler: {error.filename} was not found; install g++ or clang++, or name one in $CXX"
        except subprocess.CalledProcessError as error:
            return f"{shlex.join(error.cmd)} failed: {error.stderr.strip()}"
        except (OSError, ValueError) as error:
            return str(error)
        library.share_threads(_torch_threads())
        return library

    def _compiled(self, command: list[str]) -> Path:
        """The library for this source, compiler and CPU: from the cache, or compiled into it."""
        # The macros that a compiler predefines name its version and every instruction set of the CPU.
        macros = _output([*command, *self._flags, "-dM", "-E", "-x", "c++", os.devnull])
        key = hashlib.sha256("\0".join([self._source, *command, *self._flags, macros]).encode()).hexdigest()[:16]
        folder = _cache_folder()
        library = folder / f"{self.name}-{key}.so"
        if not library.exists():
            # Other processes may be compiling it too: each has a folder of its own, and a rename cannot be seen half
            # done.
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                source, built = Path(scratch, f"{self.name}.cpp"), Path(scratch, f"{self.name}.so")
                source.write_text(self._source)
                _output([*command, *self._flags, str(source), "-o", str(built)])
                with built.open("rb+") as file:
                    os.fsync(file.fileno())  # a torn library would be found in the cache for good
                built.replace(library)
        return library


def _torch_threads() -> ctypes.c_void_p | None:
    """GNU OpenMP's function to run one in every thread, where torch brings it, as it does on Linux.

    Its threads stay awake for a while after they worked for torch: threads of our own would wait for their cores.
    """
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p)
    except (OSError, AttributeError, TypeError):  # TypeError: Windows has no library of all symbols
        return None


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

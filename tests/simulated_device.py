"""A device that is simulated over CPU tensors: it computes right values, and shows what a GPU would be asked to do.

`Simulated` tensors say that they are on the device "simulated" and hold a CPU tensor. Every operation on them raises on
a mix with CPU tensors, as a GPU does, and is counted: one launch for each operator that is not a view, and one host
wait wherever the CPU would wait for the device. A Triton kernel is interpreted and is one launch.

    with simulated_device(), counted() as counts:
        model = to_device(model)
        model(input_ids=torch.tensor([[5, 6]], device=DEVICE))
    print(counts.launches.total(), counts.waits)
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.library import Library
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from hymba_tune.model import few_rows
from hymba_tune.model.backends import OPERATIONS
from tests.simulated_autocast import register_autocast

NAME = "simulated"
PACKAGE = Path(__file__).parent.parent
LIBRARIES = ("hymba_tune", "distill", "quant", "transformers", "peft", "trl", "accelerate")
"""The packages whose lines are reported as places."""

VIEWS = """
alias as_strided detach diagonal empty empty_like empty_strided expand is_same_size lift_fresh new_empty
new_empty_strided permute resize_ select set_ slice split split_with_sizes squeeze squeeze_ t transpose unbind unfold
unsafe_split unsqueeze unsqueeze_ view view_as_real _reshape_alias _unsafe_view"""
NO_LAUNCH = frozenset(VIEWS.split())
"""The operators that return a view or uninitialized memory."""
WAITS = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive"}
"""The operators whose result the CPU needs: a number, or a size."""
ONE_KERNEL = {"rms_norm"}
"""The composite operators that are one kernel on a GPU."""
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
Module = TypeVar("Module", bound=nn.Module)
P = ParamSpec("P")
R = TypeVar("R")


@dataclass
class Counts:
    """What a device was asked to do.

    Attributes:
        launches: The number of launches of each operator or Triton kernel.
        waits: The number of times that the host waited for the device, by operator and place.
        places: The number of launches by operator and place; empty unless they were asked for.
    """

    launches: Counter[str] = field(default_factory=Counter)
    waits: Counter[tuple[str, str]] = field(default_factory=Counter)
    places: Counter[tuple[str, str]] | None = None


_COUNTING: list[Counts] = []
"""The counts that are being taken; those of autograd's threads are the same."""


@contextmanager
def counted(*, places: bool = False) -> Iterator[Counts]:
    """Count what is asked of the device in this context; ``places`` also finds the lines that ask, slowly."""
    counts = Counts(places=Counter() if places else None)
    _COUNTING.append(counts)
    try:
        yield counts
    finally:
        _COUNTING.remove(counts)


@contextmanager
def as_one_launch(name: str) -> Iterator[None]:
    """Count all that runs in this context as one launch: a stand-in for a kernel that cannot run here."""
    _launched(name)
    hidden = _COUNTING[:]
    _COUNTING.clear()
    try:
        yield
    finally:
        _COUNTING[:] = hidden


class Simulated(torch.Tensor):
    """A tensor of the simulated device. ``inner`` is the CPU tensor with its values, of the same strides."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls: type[Simulated], inner: Tensor) -> Simulated:
        """Wrap a CPU tensor, which is not copied."""
        layout: dict[str, Any] = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        tensor: Simulated = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), **layout, dtype=inner.dtype, device=DEVICE
        )
        tensor.inner = inner
        return tensor

    def __repr__(self, **_: Any) -> str:
        """Show no values: reading them would be a host wait."""
        return f"Simulated({tuple(self.shape)}, {self.dtype})"

    def data_ptr(self) -> int:
        """Return the address of the first value."""
        return self.inner.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        """Return the memory, with which savers tell tied weights."""
        return self.inner.untyped_storage()

    def storage(self) -> Any:
        """Return the memory as values."""
        return self.inner.storage()

    def tolist(self) -> Any:
        """Return the values, after waiting for them; PyTorch itself refuses this for subclasses."""
        return self.to("cpu").tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute an operator on the device."""
        return _compute(func, args, kwargs or {})


class _Generator(torch.Generator):
    """A generator of any device, which is one of the CPU for the simulated one."""

    def __new__(cls: type[_Generator], device: torch.device | str = "cpu") -> _Generator:
        on_device = torch.device(device).type == NAME
        return super().__new__(cls, "cpu" if on_device else device)


class _FactoryMode(TorchDispatchMode):
    """Sends the operators without a simulated input to the device as well, such as those that make tensors on it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


@contextmanager
def simulated_device(*, interpret: bool = True) -> Iterator[torch.device]:
    """Make the device available; outside this context PyTorch finds no such device.

    Args:
        interpret: Whether Triton's kernels compute. Interpreting them is slow, and counting does not need their values:
            without it they are launches that leave zeros.
    """
    with ExitStack() as stack:
        stack.enter_context(patch.object(_Hooks, "available", True))
        stack.enter_context(patch.object(torch, "Generator", _Generator))
        stack.enter_context(_kernels_on_device(interpret=interpret))
        stack.enter_context(patch.object(few_rows, "PLAIN", {*few_rows.PLAIN, Simulated}))
        for operation in OPERATIONS.values():  # kernels for CUDA also run here, without a self test
            backends = {name: _on_device(backend) for name, backend in operation.backends.items()}
            stack.enter_context(patch.object(operation, "backends", backends))
        stack.enter_context(_FactoryMode())
        yield DEVICE


def in_own_thread(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function, within `simulated_device`, use the device in a thread of its own as well."""

    @wraps(function)
    def on_device(*args: P.args, **kwargs: P.kwargs) -> R:
        with _FactoryMode():
            return function(*args, **kwargs)

    return on_device


def to_device(module: Module) -> Module:
    """Move a module, in place, without untying its weights."""
    moved: dict[Tensor, Any] = {}
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter not in moved:
                inner = parameter.detach().clone()
                moved[parameter] = nn.Parameter(Simulated(inner), requires_grad=parameter.requires_grad)
            owner._parameters[name] = moved[parameter]
        for name, buffer in owner.named_buffers(recurse=False):
            owner._buffers[name] = Simulated(buffer.detach().clone())
    return module


def to_host(tensor: Tensor) -> Tensor:
    """Return a copy on the CPU, which counts as nothing."""
    return tensor.inner.detach().clone() if isinstance(tensor, Simulated) else tensor


def _on_device(backend: Any) -> Any:
    """Return a backend as it would be on a GPU: Triton's kernels can run on the device, others for CUDA cannot."""
    if backend.name != "triton":
        return backend
    return replace(backend, devices=(*(backend.devices or ()), NAME), needs_self_test=False)


def _compute(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Compute an operator on the inner tensors, and count it if the device takes part."""
    name = func._schema.name.partition("::")[2]
    leaves = tree_leaves((args, kwargs))
    inputs = [leaf for leaf in leaves if isinstance(leaf, Simulated)]
    target = next((leaf.type for leaf in leaves if isinstance(leaf, torch.device)), NAME if inputs else "cpu")
    on_device = bool(inputs) or target == NAME
    if on_device and torch.is_inference_mode_enabled() and name not in ONE_KERNEL:  # composite operators come whole
        with _FactoryMode():
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts

    if on_device:
        others = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not isinstance(leaf, Simulated)]
        _count(name, args, kwargs, inputs, others)

    if name in ("pin_memory", "_pin_memory"):  # there is no memory to pin
        return args[0]
    inner_args, inner_kwargs = tree_map(_inner, (args, kwargs))
    result = func(*inner_args, **inner_kwargs)
    if target != NAME or name == "_local_scalar_dense":
        return result
    if "empty" in name:
        result.zero_()  # kernels that are not interpreted leave it as it is, and NaN ends runs
    # A view of a tensor that was made outside inference mode belongs outside it as well.
    is_inference = any(x.is_inference() for x in inputs) or name not in NO_LAUNCH
    with torch.inference_mode(torch.is_inference_mode_enabled() and is_inference):
        wrapped = tree_map(lambda x: Simulated(x) if isinstance(x, Tensor) else x, result)
    if not inputs or name == "_to_copy":
        return wrapped
    return return_and_correct_aliasing(func, args, kwargs, wrapped)


def _inner(value: Any) -> Any:
    if isinstance(value, Simulated):
        return value.inner
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == NAME else value


def _count(name: str, args: Any, kwargs: Any, inputs: list[Simulated], others: list[Tensor]) -> None:
    """Count an operator.

    Raises:
        RuntimeError: If its inputs are on both devices.
    """
    copies = name in ("_to_copy", "copy_", "_copy_from")
    on_host = [other for other in others if other.ndim]
    if inputs and on_host and not copies and name not in INDEXING:
        shapes = ", ".join(str(tuple(x.shape)) for x in on_host)
        raise RuntimeError(f"{name} mixes tensors of the device with CPU tensors of shape {shapes} at {_place()}")

    to_host_copy = name == "_to_copy" and inputs and torch.device(kwargs.get("device") or NAME).type != NAME
    between = to_host_copy or (copies and others)
    masks = name in INDEXING and any(isinstance(x, Tensor) and x.dtype is torch.bool for x in args[1])
    unsized = name == "repeat_interleave" and kwargs.get("output_size") is None and len(args) < 3
    asynchronous = between and not to_host_copy and kwargs.get("non_blocking")
    if name in WAITS or masks or unsized or (between and not asynchronous) or (name in INDEXING and on_host):
        for counts in _COUNTING:
            counts.waits[name, _place()] += 1
    if name not in NO_LAUNCH:
        _launched(name)


def _launched(name: str) -> None:
    for counts in _COUNTING:
        counts.launches[name] += 1
        if counts.places is not None:
            counts.places[name, _place()] += 1


def _place() -> str:
    """Return the line of a library that asks for the operator now; empty in autograd's own backward."""
    frame = sys._getframe(1)
    while frame := frame.f_back:  # type: ignore[assignment]
        path = Path(frame.f_code.co_filename)
        parts = path.parts
        if path.name.startswith("simulated") or "torch" in parts:
            continue
        if any(library in parts for library in LIBRARIES):
            return f"{'/'.join(parts[-2:])}:{frame.f_lineno}"
    return ""


@contextmanager
def _kernels_on_device(*, interpret: bool) -> Iterator[None]:
    """Let Triton's interpreter read and write the inner tensors, and count one launch for each kernel."""
    from triton.runtime.interpreter import GridExecutor

    original: Callable[..., None] = GridExecutor.__call__

    def launch(executor: Any, *args: Any, **kwargs: Any) -> None:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_device = [tensor.inner for tensor in tensors if isinstance(tensor, Simulated)]
        if on_device:
            _launched(executor.fn.__name__)
        if 0 < len(on_device) < len(tensors):
            raise RuntimeError(f"{executor.fn.__name__} mixes tensors of the device with CPU tensors at {_place()}")

        with torch._C._DisableTorchDispatch():
            if interpret or not on_device:
                original(executor, *tree_map(_inner, args), **tree_map(_inner, kwargs))

    with patch.object(GridExecutor, "__call__", launch):
        yield


class _Hooks(torch._C._acc.PrivateUse1Hooks):
    """What PyTorch asks about the device."""

    available = False

    def is_available(self) -> bool:
        return self.available

    def has_primary_context(self, _: int) -> bool:
        return True

    def is_built(self) -> bool:
        return True


class _Device(backend_registration._DummyBackendModule):
    """The module ``torch.simulated``."""

    def is_available(self) -> bool:
        return _Hooks.available

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def is_bf16_supported(self) -> bool:
        return True

    def synchronize(self, *_: Any) -> None:
        for counts in _COUNTING:
            counts.waits["synchronize", _place()] += 1

    def get_rng_state(self, *_: Any) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, *_: Any) -> None:
        torch.set_rng_state(state)


def _register() -> list[Library]:
    """Register the device; the libraries last as long as they are referred to."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, _Device(), _Hooks())
    operators = Library("aten", "IMPL")
    # `torch.tensor` makes its tensor below the mode.
    for name in ("empty_strided", "empty.memory_format", "_copy_from", "copy_"):
        packet, _, overload = name.partition(".")
        func = getattr(getattr(torch.ops.aten, packet), overload or "default")
        operators.impl(name, lambda *args, _func=func, **kwargs: _compute(_func, args, kwargs), "PrivateUse1")
    return [operators, *register_autocast()]


_LIBRARIES = _register()
DEVICE = torch.device(NAME, 0)

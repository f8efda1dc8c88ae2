"""Autocast on the simulated device, with the lists of operators that it has on CUDA.

Casts of weights are not kept until the end of the context, as they are on CUDA: a step uses almost every weight once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, fallthrough_kernel
from torch.utils._pytree import tree_leaves, tree_map

LOWER = "linear matmul mm addmm bmm baddbmm addbmm mv addmv conv1d conv2d einsum scaled_dot_product_attention"
"""The operators that run in the lower precision."""
FLOAT32 = """
acos asin cosh exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan pow.Tensor_Scalar pow.Tensor_Tensor pow.Scalar
softplus layer_norm nll_loss cross_entropy_loss cumsum cumprod norm.Scalar softmax.int log_softmax.int sum
sum.dim_IntList prod mse_loss kl_div"""
"""The operators that run in float32."""
WIDEST = "addcdiv addcmul cat stack dot cross index_put scatter_add bilinear"
"""The operators whose inputs are promoted to the widest of them."""


def register_autocast() -> list[Library]:
    """Register the operators; the libraries last as long as they are referred to."""
    others = Library("_", "IMPL")
    others.fallback(fallthrough_kernel, "AutocastPrivateUse1")
    operators = Library("aten", "IMPL")
    for names, choose in ((LOWER, _lower), (FLOAT32, _float32), (WIDEST, _widest)):
        for name in names.split():
            packet, _, overload = name.partition(".")
            func = getattr(getattr(torch.ops.aten, packet), overload or "default")
            operators.impl(name, _casting(func, choose), "AutocastPrivateUse1")
    return [others, operators]


def _casting(func: Any, choose: Callable[[list[Tensor]], torch.dtype]) -> Callable[..., Any]:
    def cast_and_compute(*args: Any, **kwargs: Any) -> Any:
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            tensors = [x for x in tree_leaves((args, kwargs)) if _is_cast(x)]
            dtype = choose(tensors)
            args, kwargs = tree_map(lambda x: x.to(dtype) if _is_cast(x) else x, (args, kwargs))
            return func(*args, **kwargs)

    return cast_and_compute


def _is_cast(value: Any) -> bool:
    """Whether autocast changes a value: a tensor of the device of floats that are not float64."""
    on_device = isinstance(value, Tensor) and value.device.type == "simulated"
    return on_device and value.is_floating_point() and value.dtype is not torch.float64


def _lower(_: list[Tensor]) -> torch.dtype:
    return torch.get_autocast_dtype("simulated")


def _float32(_: list[Tensor]) -> torch.dtype:
    return torch.float32


def _widest(tensors: list[Tensor]) -> torch.dtype:
    return torch.float32 if any(x.dtype is torch.float32 for x in tensors) else _lower(tensors)

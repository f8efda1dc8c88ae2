"""LoRA's update of a linear layer in fewer operations than PEFT needs.

PEFT casts the input to float32 and, under autocast, back again; it scales the update, and adds it to the output of the
base layer, in operations of their own. On a GPU each of them waits for its launch and moves the whole output.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hymba_tune.model.autocast import outside_autocast
from hymba_tune.model.few_rows import is_plain


class LowRankLinear(Linear):
    """PEFT's adapted linear layer, which leaves to PEFT all but one plain LoRA adapter."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map ``(..., in)`` to ``(..., out)``."""
        if args or kwargs or not self._is_plain():
            output: Tensor = super().forward(x, *args, **kwargs)
            return output

        name = self.active_adapters[0]
        down, up = self.lora_A[name].weight, self.lora_B[name].weight
        updated: Tensor = _LowRankUpdate.apply(
            self.base_layer(x), self.lora_dropout[name](x), down, up, self.scaling[name]
        )
        return updated

    def _is_plain(self) -> bool:
        """Return whether one LoRA adapter is trained whose factors are in memory without a call of their modules.

        Without gradients PEFT computes, so that an adapter gives the same logits, bit for bit, wherever PEFT loads it.
        """
        if not torch.is_grad_enabled() or self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return False
        name = self.active_adapters[0]
        return (
            name in self.lora_A
            and name not in self.lora_variant
            and not self.lora_bias[name]
            and all(is_plain(factor[name], nn.Linear) for factor in (self.lora_A, self.lora_B))
        )


def use_fewer_operations(model: nn.Module) -> None:
    """Let the adapted linear layers of a model compute their updates in fewer operations."""
    for module in model.modules():
        if type(module) is Linear:
            module.__class__ = LowRankLinear


class _LowRankUpdate(torch.autograd.Function):
    """``output + scaling * x @ down.T @ up.T`` in the dtype of the output, in the memory of the output."""

    @staticmethod
    @outside_autocast
    def forward(ctx: Any, output: Tensor, x: Tensor, down: Tensor, up: Tensor, scaling: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).to(output.dtype)
        cast_down, scaled_up = down.to(output.dtype), _scaled(up, scaling, output.dtype)
        inner = rows @ cast_down.t()
        ctx.save_for_backward(rows, inner, cast_down, scaled_up)
        ctx.scaling, ctx.shape, ctx.dtypes = scaling, x.shape, (x.dtype, down.dtype, up.dtype)

        ctx.mark_dirty(output)
        output.view(-1, output.shape[-1]).addmm_(inner, scaled_up.t())
        return output

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, ...]:
        rows, inner, down, scaled_up = ctx.saved_tensors
        x_dtype, down_dtype, up_dtype = ctx.dtypes
        need_output, need_x, need_down, need_up, _ = ctx.needs_input_grad

        flat = d_output.reshape(-1, d_output.shape[-1])
        d_inner = flat @ scaled_up
        d_up = _scaled(flat.t() @ inner, ctx.scaling, up_dtype) if need_up else None
        d_down = (d_inner.t() @ rows).to(down_dtype) if need_down else None
        dx = (d_inner @ down).to(x_dtype).view(ctx.shape) if need_x else None
        return d_output if need_output else None, dx, d_down, d_up, None


def _scaled(matrix: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """Return a scaled matrix in another dtype, in one operation."""
    return torch.mul(matrix, scaling, out=torch.empty_like(matrix, dtype=dtype))

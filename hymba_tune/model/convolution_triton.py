"""The convolution and the silu after it on a GPU, in Triton: one launch forward, and one or two backward.

A launch processes the meta tokens and all texts, which it finds on the device: nothing waits for the GPU. The backward
computes everything again from the inputs, which are all that is saved. The programs sum the gradients of the weight
over their own rows, and one more launch adds these sums, so that the result is deterministic.

Glossary: M meta tokens, T tokens, S texts, E channels, K width of the convolution.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# With exported code, transformers copies the modules of these imports, but not those of `from . import`.
from .convolution_kernels import convolve, convolve_backward
from .documents import Documents
from .triton_kernels import OPTIONS, power_of_2, readable, summed_parts

TOKENS, CHANNELS = 8, 64
"""The numbers of tokens and channels of a block. A thread of four warps holds four channels, with all their weights and
sums; the backward then takes 152 registers at most."""
BLOCKS = 4
"""The number of blocks of tokens of a program, which loads the weight once."""
STRIPS = 64
"""The largest number of programs that sum the gradients of the weight in a block of channels."""


class Texts(NamedTuple):
    """Where the texts are, and what to compute.

    Attributes:
        ids: ``(T,)``, the text of each token; None if there are no rows but the meta tokens.
        starts: ``(S + 1,)``, the offsets of the texts among the T tokens; None likewise.
        meta: The number M of meta tokens.
        number: The number S of texts.
        silu: Whether to apply silu to the result.
        keep: Whether to return the last inputs of each text.
    """

    ids: Tensor | None
    starts: Tensor | None
    meta: int
    number: int
    silu: bool
    keep: bool


def triton_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve one text ``(T, E)`` that starts from zeros."""
    y, _ = _convolve(x, weight, bias, None, Texts(None, None, len(x), 0, silu=False, keep=False))
    return y


def triton_packed_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, documents: Documents, initial: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """Compute `packed_conv1d`, without gradients of the initial inputs and through the last inputs.

    Args:
        x: ``(M + T, E)``; the rows may be parts of the rows of a wider matrix.
        weight: ``(E, K)``.
        bias: ``(E,)`` or None.
        documents: The layout of the packed texts.
        initial: ``(S, K - 1, E)``, the inputs before each text; None for zeros or the last meta tokens.
        keep: Whether to return the last inputs of each text, ``(S, K - 1, E)``.
    """
    texts = Texts(documents.ids, documents.cu_seqlens, documents.num_meta, len(documents.lengths), silu=True, keep=keep)
    return _convolve(x, weight, bias, None if initial is None else initial.detach().contiguous(), texts)


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial: Tensor | None, texts: Texts
) -> tuple[Tensor, Tensor | None]:
    with torch.cuda.device_of(x):
        bias = None if bias is None else bias.contiguous()
        y, tails = _Convolution.apply(readable(x), weight.contiguous(), bias, initial, texts)
    return y, tails


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, initial: Tensor | None, texts: Texts
    ) -> tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(x, weight, bias, initial, texts.ids, texts.starts)
        ctx.texts = texts._replace(ids=None, starts=None)
        before = weight.shape[1] - 1
        y = x.new_empty(x.shape)
        tails = x.new_empty(texts.number, before, x.shape[1]) if texts.keep else None
        written = tails if before else None

        strips = -(-len(x) // (TOKENS * BLOCKS))
        others = 0 if written is None else -(-texts.number * before // TOKENS)
        grid, sizes = _blocks(strips, others, x, weight, texts)
        convolve[grid](x, weight, bias, initial, texts.ids, texts.starts, y, written, **sizes)
        if tails is not None:
            ctx.mark_non_differentiable(tails)
        ctx.set_materialize_grads(False)
        return y, tails

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return None, None, None, None, None
        x, weight, bias, initial, ids, starts = ctx.saved_tensors
        texts, dy = ctx.texts, readable(dy)
        _, need_weight, need_bias, *_ = ctx.needs_input_grad
        taps = weight.shape[1]
        dx = x.new_empty(x.shape)
        fused = bool(texts.meta and texts.number and taps > 1)

        strips = -(-len(x) // (TOKENS * BLOCKS))
        parts = None
        if need_weight or need_bias:
            strips = min(strips, STRIPS)
            parts = x.new_empty(strips, weight.numel() + len(weight), dtype=torch.float32)
        grid, sizes = _blocks(strips, int(fused), x, weight, texts)
        sizes |= {"dy_row": dy.stride(0), "FUSED": fused, "BLOCK_K": power_of_2(taps + 1)}
        convolve_backward[grid](x, weight, bias, initial, ids, starts, dy, dx, parts, **sizes)
        if parts is None:
            return dx, None, None, None, None
        d_weight, d_bias = summed_parts(parts, weight.dtype).split([weight.numel(), len(weight)])
        return dx, d_weight.view_as(weight), d_bias.to(bias.dtype) if need_bias else None, None, None


def _blocks(
    strips: int, others: int, x: Tensor, weight: Tensor, texts: Texts
) -> tuple[tuple[int, int], dict[str, Any]]:
    """Return the grid of that many programs for the rows and others after them, and the sizes of a kernel."""
    rows, channels = x.shape
    block_e = min(CHANNELS, power_of_2(channels))
    sizes = {
        "meta": texts.meta,
        "rows": rows,
        "texts": texts.number,
        "strips": strips,
        "x_row": x.stride(0),
        "E": channels,
    }
    sizes |= {"E": channels, "K": weight.shape[1], "SILU": texts.silu}
    sizes |= {"BLOCK_T": TOKENS, "BLOCK_E": block_e, "num_warps": 4, "num_stages": 1}
    return (strips + others, -(-channels // block_e)), sizes | OPTIONS

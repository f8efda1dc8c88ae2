"""Attention through FlashAttention's kernels, on the packed rows as they are.

The kernels know texts laid end to end, causality and windows, but not keys that every text sees. So the queries of the
texts attend twice, to their own text and to the meta tokens, and the two parts are merged by the logarithms of their
softmax's denominators (arXiv 2205.14135, section 3.1):

    lse = log sum_p exp(lse_p)        out = sum_p exp(lse_p - lse) out_p

Given the merged lse and out, the backward of a part finds the weights exp(scores - lse) and the inner products
sum(d_out * out) of the whole softmax, and the gradients of the parts simply add up.

Glossary: M meta tokens, T text tokens, H query heads, G key/value heads, a width of a query or key head, v width of a
value head, d_x the gradient of x.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from itertools import pairwise
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .autocast import outside_autocast
from .backends import Task
from .documents import Documents
from .hub_kernels import hub_kernel

WIDEST = 256
"""The widest head of the kernels."""
SHARED = 1024
"""Queries that share one copy of the meta keys. A backward gives each block of keys to one group of threads; without
copies the few meta keys would keep few groups busy, for as long as all the queries take."""


def flash_attention(query: Tensor, key: Tensor, value: Tensor, documents: Documents, window: int | None) -> Tensor:
    """Attend as `packed_attention` says, with the first of `PROVIDERS` that is installed.

    Args:
        query: ``(M + T, H, a)``, float16 or bfloat16, on a GPU.
        key: ``(M + T, G, a)``.
        value: ``(M + T, G, v)``; v is a multiple of a.
        documents: Where the texts lie.
        window: Tokens a query looks back, or None for the whole text.

    Returns:
        ``(M + T, H * v)``.
    """
    parts = _parts(documents.starts, documents.num_meta, window, query.device)
    output: Tensor = _MergedAttention.apply(*map(_aligned, (query, key, value)), parts, _provider())
    return output.flatten(1)


@cache
def flash_unavailable_reason() -> str | None:
    """Why no FlashAttention can be used on this machine, or None if one can."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if torch.cuda.get_device_capability() < (8, 0):
        return "FlashAttention needs a GPU of compute capability 8.0 or more"
    if _provider() is None:
        return "PyTorch is built without FlashAttention, and none is installed (pip install flash-attn)"
    return None


def flash_unsupported_reason(task: Task) -> str | None:
    """Why heads of a task's widths cannot be taken, or None if they can."""
    width, value_width = task.widths
    if width % 8 or width > WIDEST:
        return f"the width of a head must be a multiple of 8 up to {WIDEST}, not {width}"
    if value_width % width:
        return f"the width of a value head must be a multiple of a query head's {width}, not {value_width}"
    return None


class Runs(NamedTuple):
    """Runs of queries laid end to end, and for each the run of keys it attends to.

    Attributes:
        cu_q: ``(runs + 1,)`` int32, where the runs of queries begin, and where the last ends.
        cu_k: Likewise, of keys.
        max_q: Queries of the longest run.
        max_k: Keys of the longest run.
        causal: Whether a query sees no key after it, the last of both being level.
        left: How many keys before it a query sees; -1 for all.
    """

    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int
    causal: bool
    left: int = -1

    @property
    def right(self) -> int:
        """How many keys after it a query sees; -1 for all."""
        return 0 if self.causal else -1

    @property
    def plain(self) -> bool:
        """Causal without a window, the one case that the kernels call causal."""
        return self.causal and self.left < 0


Gradients = tuple[Tensor, Tensor, Tensor]


class Provider(NamedTuple):
    """One implementation of FlashAttention.

    Attributes:
        name: What it is called.
        forward: ``(q, k, v, runs, scale)`` to out ``(queries, H, a)`` and lse ``(H, queries)``.
        backward: ``(d_out, q, k, v, out, lse, runs, scale)`` to d_q, d_k and d_v.
    """

    name: str
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., Gradients]


class _Part(NamedTuple):
    """Some rows' attention to some rows' keys, which ``copies`` of the runs share."""

    queries: slice
    keys: slice
    runs: Runs
    copies: int = 1
    merged: bool = False
    """Whether the queries have already attended to other keys."""

    def of_keys(self, rows: Tensor) -> Tensor:
        """Its keys or values, a copy behind the other."""
        return rows[self.keys].repeat(self.copies, 1, 1) if self.copies > 1 else rows[self.keys]


@lru_cache(maxsize=8)  # global and windowed layers, for each layout of a few micro-batches
def _parts(starts: tuple[int, ...], meta: int, window: int | None, device: torch.device) -> tuple[_Part, ...]:
    def offsets(numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=device)

    texts, total = sorted({*starts}), starts[-1]  # empty texts drop out
    longest = max(end - start for start, end in pairwise(texts))
    within = offsets(texts)
    of_texts = slice(meta, meta + total)
    left = -1 if window is None else window
    own = _Part(of_texts, of_texts, Runs(within, within, longest, longest, causal=True, left=left))
    if not meta:
        return (own,)
    of_meta, once = slice(0, meta), offsets([0, meta])
    shares = [*range(0, total, SHARED), total]
    copies = len(shares) - 1
    again = offsets([meta * copy for copy in range(copies + 1)])
    to_meta = Runs(offsets(shares), again, min(total, SHARED), meta, causal=False)
    return (
        own,
        _Part(of_meta, of_meta, Runs(once, once, meta, meta, causal=True)),
        _Part(of_texts, of_meta, to_meta, copies, merged=True),
    )


def _aligned(rows: Tensor) -> Tensor:
    """The tensor, copied if the kernels could not read sixteen bytes at a time of its rows."""
    unit = 16 // rows.element_size()
    even = all(stride % unit == 0 for stride in rows.stride()[:-1])
    return rows if rows.stride(-1) == 1 and even and rows.data_ptr() % 16 == 0 else rows.contiguous()


class _MergedAttention(torch.autograd.Function):
    """All parts. Values are taken a query head's width at a time, since FlashAttention 2 takes no other."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, parts: tuple[_Part, ...], provider: Provider
    ) -> Tensor:
        rows, heads, width = query.shape
        output = query.new_empty(rows, heads, value.shape[-1])
        lse = query.new_empty(heads, rows, dtype=torch.promote_types(query.dtype, torch.float32))
        for part in parts:
            keys, values = part.of_keys(key), part.of_keys(value).split(width, -1)
            pieces = [provider.forward(query[part.queries], keys, v, part.runs, width**-0.5) for v in values]
            out, own_lse = torch.cat([out for out, _ in pieces], -1), pieces[0][1]
            if part.merged:
                before = lse[:, part.queries]
                share = torch.sigmoid(own_lse - before).T[..., None]
                out = output[part.queries].to(lse.dtype).lerp(out.to(lse.dtype), share)
                own_lse = torch.logaddexp(own_lse, before)
            output[part.queries], lse[:, part.queries] = out, own_lse
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.parts, ctx.provider = parts, provider
        return output

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, lse = ctx.saved_tensors
        width, d_output = query.shape[-1], _aligned(d_output)
        d_query, d_key, d_value = (torch.zeros_like(x) for x in (query, key, value))
        for part in ctx.parts:
            keys, own_lse = part.of_keys(key), lse[:, part.queries].contiguous()
            by_width = (x.split(width, -1) for x in (d_output[part.queries], part.of_keys(value), output[part.queries]))
            pieces = zip(*by_width, d_value[part.keys].split(width, -1), strict=True)
            for d_out, v, out, d_v_total in pieces:
                d_q, d_k, d_v = ctx.provider.backward(
                    d_out, query[part.queries], keys, v, out, own_lse, part.runs, width**-0.5
                )
                d_query[part.queries] += d_q
                d_key[part.keys] += d_k.unflatten(0, (part.copies, -1)).sum(0)
                d_v_total += d_v.unflatten(0, (part.copies, -1)).sum(0)
        return d_query, d_key, d_value, None, None


def _flash_attn_3() -> Provider | None:
    """What github.com/Dao-AILab/flash-attention builds from its folder hopper, for compute capability 9 only."""
    if torch.cuda.get_device_capability()[0] != 9:
        return None
    try:
        import flash_attn_interface  # noqa: F401  (registers torch.ops.flash_attn_3)
    except ImportError:
        return None

    def layout(runs: Runs, scale: float) -> dict[str, Any]:
        return {
            **{"cu_seqlens_q": runs.cu_q, "cu_seqlens_k": runs.cu_k},
            **{"max_seqlen_q": runs.max_q, "max_seqlen_k": runs.max_k, "softmax_scale": scale},
            **{"is_causal": runs.plain, "window_size_left": runs.left, "window_size_right": runs.right},
        }

    def forward(q: Tensor, k: Tensor, v: Tensor, runs: Runs, scale: float) -> tuple[Tensor, Tensor]:
        out, lse, *_ = torch.ops.flash_attn_3.fwd(q, k, v, **layout(runs, scale), num_splits=1)
        return out, lse

    def backward(
        d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, runs: Runs, scale: float
    ) -> Gradients:
        gradients = _empty_gradients(q, k, v)
        exact = torch.are_deterministic_algorithms_enabled()
        torch.ops.flash_attn_3.bwd(d_out, q, k, v, out, lse, *gradients, **layout(runs, scale), deterministic=exact)
        return gradients

    return Provider("flash-attn 3", forward, backward)


def _flash_attn_4() -> Provider | None:
    """The package flash-attn-4, for compute capability 10 and 11: on 9 its backward knows neither texts nor windows."""
    if torch.cuda.get_device_capability()[0] not in (10, 11):
        return None
    try:
        from flash_attn.cute import interface
    except ImportError:
        return None

    def layout(runs: Runs, scale: float) -> dict[str, Any]:
        left, right = (None if side < 0 or runs.plain else side for side in (runs.left, runs.right))
        return {
            **{"cu_seqlens_q": runs.cu_q, "cu_seqlens_k": runs.cu_k},
            **{"max_seqlen_q": runs.max_q, "max_seqlen_k": runs.max_k, "softmax_scale": scale},
            **{"causal": runs.plain, "window_size_left": left, "window_size_right": right},
        }

    def forward(q: Tensor, k: Tensor, v: Tensor, runs: Runs, scale: float) -> tuple[Tensor, Tensor]:
        out, lse, *_ = interface._flash_attn_fwd(q, k, v, **layout(runs, scale), return_lse=True)
        return out, lse

    def backward(
        d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, runs: Runs, scale: float
    ) -> Gradients:
        exact = torch.are_deterministic_algorithms_enabled()
        d_q, d_k, d_v, *_ = interface._flash_attn_bwd(
            *(x.contiguous() for x in (q, k, v, out, d_out)), lse, **layout(runs, scale), deterministic=exact
        )
        return d_q, d_k, d_v

    return Provider("flash-attn 4", forward, backward)


def _flash_attn_2() -> Provider | None:
    """The package flash-attn from 2.7 on, where a window is two arguments."""
    try:
        from flash_attn import flash_attn_interface
    except ImportError:
        return None
    return _of_interface("flash-attn 2", flash_attn_interface)


def _of_hub() -> Provider | None:
    """The same, compiled by the Hub."""
    interface = getattr(hub_kernel("flash-attn2"), "flash_attn_interface", None)
    return None if interface is None else _of_interface("flash-attn 2 of the Hub", interface)


def _of_interface(name: str, interface: ModuleType) -> Provider:

    def layout(runs: Runs, scale: float) -> dict[str, Any]:
        return {
            **{"cu_seqlens_q": runs.cu_q, "cu_seqlens_k": runs.cu_k},
            **{"max_seqlen_q": runs.max_q, "max_seqlen_k": runs.max_k, "dropout_p": 0.0, "softmax_scale": scale},
            **{"causal": runs.plain, "window_size_left": runs.left, "window_size_right": runs.right},
        }

    def forward(q: Tensor, k: Tensor, v: Tensor, runs: Runs, scale: float) -> tuple[Tensor, Tensor]:
        out, lse, *_ = interface._flash_attn_varlen_forward(q, k, v, **layout(runs, scale))
        return out, lse

    def backward(
        d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, runs: Runs, scale: float
    ) -> Gradients:
        gradients = _empty_gradients(q, k, v)
        exact = torch.are_deterministic_algorithms_enabled()
        more = {"softcap": 0.0, "alibi_slopes": None, "deterministic": exact}
        interface._flash_attn_varlen_backward(d_out, q, k, v, out, lse, *gradients, **layout(runs, scale), **more)
        return gradients

    return Provider(name, forward, backward)


def _of_pytorch() -> Provider | None:
    """What PyTorch itself contains: FlashAttention 2, or what `activate_flash_attention_impl` put in its place."""
    if not torch.backends.cuda.is_flash_attention_available():
        return None

    def forward(q: Tensor, k: Tensor, v: Tensor, runs: Runs, scale: float) -> tuple[Tensor, Tensor]:
        window = {"window_size_left": runs.left, "window_size_right": runs.right}
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, runs.cu_q, runs.cu_k, runs.max_q, runs.max_k, 0.0, runs.plain, False, scale=scale, **window
        )
        return out, lse

    def backward(
        d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, runs: Runs, scale: float
    ) -> Gradients:
        window = {"window_size_left": runs.left, "window_size_right": runs.right}
        # Without dropout the state of its random numbers is not read.
        unread = q.new_zeros(2, dtype=torch.uint64), q.new_empty(0)
        layout = runs.cu_q, runs.cu_k, runs.max_q, runs.max_k, 0.0, runs.plain
        gradients: Gradients = torch.ops.aten._flash_attention_backward(
            d_out, q, k, v, out, lse, *layout, *unread, scale=scale, **window
        )
        return gradients

    return Provider("PyTorch", forward, backward)


def _empty_gradients(q: Tensor, k: Tensor, v: Tensor) -> Gradients:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


PROVIDERS = (_flash_attn_4, _flash_attn_3, _flash_attn_2, _of_pytorch, _of_hub)
"""Where to look for FlashAttention, the fastest first."""


@cache
def _provider() -> Provider | None:
    return next(filter(None, (find() for find in PROVIDERS)), None)

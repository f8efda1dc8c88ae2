"""Attention through FlashAttention kernels, directly on the packed rows.

The kernels support packed texts, causal masks and windows, but not keys that every text sees. The queries of the texts
therefore attend twice, once to their own text and once to the meta tokens. The two parts are merged by the logarithms
of their softmax denominators (arXiv 2205.14135, section 3.1):

    lse = log sum_p exp(lse_p)        out = sum_p exp(lse_p - lse) out_p

Given the merged lse and out, the backward of each part computes the weights exp(scores - lse) and the inner products
sum(d_out * out) of the whole softmax, so the gradients of the parts add up.

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
"""The widest head that the kernels support."""
SHARED = 1024
"""The number of queries that share one copy of the meta keys. A backward assigns each block of keys to one group of
threads. Without copies, the few meta keys would occupy only a few groups, for as long as all queries take."""


def flash_attention(query: Tensor, key: Tensor, value: Tensor, documents: Documents, window: int | None) -> Tensor:
    """Compute `packed_attention` with the fastest FlashAttention that is installed.

    Without gradients, one that is compiled at its first call comes last, since the first token of an answer waits.

    Args:
        query: ``(M + T, H, a)``, float16 or bfloat16, on a GPU.
        key: ``(M + T, G, a)``.
        value: ``(M + T, G, v)``; v is a multiple of a.
        documents: The layout of the packed texts.
        window: The number of earlier tokens that a query sees, or None for the whole text.

    Returns:
        ``(M + T, H * v)``.
    """
    parts = _parts(documents.starts, documents.num_meta, window, query.device)
    provider = _provider(torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)))
    output: Tensor = _MergedAttention.apply(*map(_aligned, (query, key, value)), parts, provider)
    return output.flatten(1)


@cache
def flash_unavailable_reason() -> str | None:
    """Return why FlashAttention cannot be used on this machine, or None if it can."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if torch.cuda.get_device_capability() < (8, 0):
        return "FlashAttention needs a GPU of compute capability 8.0 or more"
    if _provider(gradients=True) is None:
        return "this PyTorch has no FlashAttention and no package provides one (pip install 'hymba-tune[flash]')"
    return None


def flash_unsupported_reason(task: Task) -> str | None:
    """Return why the head widths of a task are not supported, or None if they are."""
    width, value_width = task.widths
    if width % 8 or width > WIDEST:
        return f"the width of a head must be a multiple of 8, at most {WIDEST}; it is {width}"
    if value_width % width:
        return f"the width of a value head must be a multiple of {width}, a query head's; it is {value_width}"
    return None


class Runs(NamedTuple):
    """Packed runs of queries, and for each the run of keys that it attends to.

    Attributes:
        cu_q: ``(runs + 1,)`` int32, the offsets of the runs of queries.
        cu_k: ``(runs + 1,)`` int32, the offsets of the runs of keys.
        max_q: The number of queries in the longest run.
        max_k: The number of keys in the longest run.
        causal: Whether a query sees no key after it. The last query of a run is aligned with its last key.
        left: The number of earlier keys that a query sees; -1 for all.
    """

    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int
    causal: bool
    left: int = -1

    @property
    def right(self) -> int:
        """The number of later keys that a query sees; -1 for all."""
        return 0 if self.causal else -1

    @property
    def plain(self) -> bool:
        """Whether the mask is causal without a window, the only case that the kernels call causal."""
        return self.causal and self.left < 0


Gradients = tuple[Tensor, Tensor, Tensor]


class Provider(NamedTuple):
    """One implementation of FlashAttention.

    Attributes:
        name: The name of the implementation.
        forward: A function of ``(q, k, v, runs, scale)`` that returns out ``(queries, H, a)`` and lse ``(H, queries)``.
        backward: A function of ``(d_out, q, k, v, out, lse, runs, scale)`` that returns d_q, d_k and d_v.
    """

    name: str
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., Gradients]


class _Part(NamedTuple):
    """The attention of some rows to the keys of some rows, which are copied ``copies`` times."""

    queries: slice
    keys: slice
    runs: Runs
    copies: int = 1
    merged: bool = False
    """Whether the queries have already attended to other keys, so that the two results are merged."""

    def of_keys(self, rows: Tensor) -> Tensor:
        """Return the keys or values of the part, one copy after the other."""
        return rows[self.keys].repeat(self.copies, 1, 1) if self.copies > 1 else rows[self.keys]


@lru_cache(maxsize=8)  # a global and a windowed layout for each of a few micro-batches
def _parts(starts: tuple[int, ...], meta: int, window: int | None, device: torch.device) -> tuple[_Part, ...]:
    def offsets(numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=device)

    total = starts[-1]
    texts = sorted({*starts})  # the kernels do not accept empty texts
    longest = max(end - start for start, end in pairwise(texts))
    text_offsets = offsets(texts)
    text_rows = slice(meta, meta + total)
    left = -1 if window is None else window
    within_texts = Runs(text_offsets, text_offsets, longest, longest, causal=True, left=left)
    if not meta:
        return (_Part(text_rows, text_rows, within_texts),)

    meta_rows = slice(0, meta)
    meta_offsets = offsets([0, meta])
    within_meta = Runs(meta_offsets, meta_offsets, meta, meta, causal=True)

    shares = [*range(0, total, SHARED), total]
    copies = len(shares) - 1
    copy_offsets = offsets([meta * copy for copy in range(copies + 1)])
    texts_to_meta = Runs(offsets(shares), copy_offsets, min(total, SHARED), meta, causal=False)
    return (
        _Part(text_rows, text_rows, within_texts),
        _Part(meta_rows, meta_rows, within_meta),
        _Part(text_rows, meta_rows, texts_to_meta, copies, merged=True),
    )


def _aligned(rows: Tensor) -> Tensor:
    """Return the tensor, copied if the kernels could not read its rows 16 bytes at a time."""
    unit = 16 // rows.element_size()
    strides_fit = all(stride % unit == 0 for stride in rows.stride()[:-1])
    return rows if rows.stride(-1) == 1 and strides_fit and rows.data_ptr() % 16 == 0 else rows.contiguous()


class _MergedAttention(torch.autograd.Function):
    """The attention of all parts. Values are split to the width of a query head, as FlashAttention 2 requires."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, parts: tuple[_Part, ...], provider: Provider
    ) -> Tensor:
        rows, heads, width = query.shape
        output = query.new_empty(rows, heads, value.shape[-1])
        lse = query.new_empty(heads, rows, dtype=torch.promote_types(query.dtype, torch.float32))
        for part in parts:
            keys = part.of_keys(key)
            values = part.of_keys(value).split(width, -1)
            results = [provider.forward(query[part.queries], keys, v, part.runs, width**-0.5) for v in values]
            out = torch.cat([out for out, _ in results], -1)
            part_lse = results[0][1]

            if part.merged:
                earlier_lse = lse[:, part.queries]
                share = torch.sigmoid(part_lse - earlier_lse).T[..., None]
                out = output[part.queries].to(lse.dtype).lerp(out.to(lse.dtype), share)
                part_lse = torch.logaddexp(part_lse, earlier_lse)
            output[part.queries] = out
            lse[:, part.queries] = part_lse

        ctx.save_for_backward(query, key, value, output, lse)
        ctx.parts = parts
        ctx.provider = provider
        return output

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, lse = ctx.saved_tensors
        width = query.shape[-1]
        d_output = _aligned(d_output)
        d_query, d_key, d_value = (torch.zeros_like(x) for x in (query, key, value))

        for part in ctx.parts:
            keys = part.of_keys(key)
            part_lse = lse[:, part.queries].contiguous()
            by_width = (x.split(width, -1) for x in (d_output[part.queries], part.of_keys(value), output[part.queries]))
            for d_out, v, out, d_v_total in zip(*by_width, d_value[part.keys].split(width, -1), strict=True):
                d_q, d_k, d_v = ctx.provider.backward(
                    d_out, query[part.queries], keys, v, out, part_lse, part.runs, width**-0.5
                )
                d_query[part.queries] += d_q
                d_key[part.keys] += d_k.unflatten(0, (part.copies, -1)).sum(0)
                d_v_total += d_v.unflatten(0, (part.copies, -1)).sum(0)
        return d_query, d_key, d_value, None, None


def _generation() -> int:
    """Return the major compute capability of an NVIDIA GPU; zero for AMD's, which number theirs in their own way."""
    return 0 if torch.version.hip else torch.cuda.get_device_capability()[0]


def _flash_attn_3() -> Provider | None:
    """Return the build of the folder hopper of github.com/Dao-AILab/flash-attention, for compute capability 9 only."""
    if _generation() != 9:
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
        deterministic = torch.are_deterministic_algorithms_enabled()
        torch.ops.flash_attn_3.bwd(
            d_out, q, k, v, out, lse, *gradients, **layout(runs, scale), deterministic=deterministic
        )
        return gradients

    return Provider("flash-attn 3", forward, backward)


def _flash_attn_4() -> Provider | None:
    """Return the package flash-attn-4, for compute capability 10 to 12.

    On 9, its backward supports neither packed texts nor windows. On 12, it has no deterministic backward.
    """
    refuses = torch.are_deterministic_algorithms_enabled() and _generation() == 12
    if refuses or _generation() not in (10, 11, 12):
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
        deterministic = torch.are_deterministic_algorithms_enabled()
        d_q, d_k, d_v, *_ = interface._flash_attn_bwd(
            *(x.contiguous() for x in (q, k, v, out, d_out)), lse, **layout(runs, scale), deterministic=deterministic
        )
        return d_q, d_k, d_v

    return Provider("flash-attn 4", forward, backward)


def _flash_attn_2() -> Provider | None:
    """Return the package flash-attn, version 2.7 or later, in which a window is two arguments."""
    try:
        from flash_attn import flash_attn_interface
    except ImportError:
        return None
    return _of_interface("flash-attn 2", flash_attn_interface)


def _of_hub() -> Provider | None:
    """Return flash-attn 2 as the Hub distributes it, compiled."""
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
        deterministic = torch.are_deterministic_algorithms_enabled()
        more = {"softcap": 0.0, "alibi_slopes": None, "deterministic": deterministic}
        interface._flash_attn_varlen_backward(d_out, q, k, v, out, lse, *gradients, **layout(runs, scale), **more)
        return gradients

    return Provider(name, forward, backward)


def _of_pytorch() -> Provider | None:
    """Return the FlashAttention 2 of PyTorch itself, or what `activate_flash_attention_impl` replaced it with."""
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
        # Without dropout, the state of the random number generator is not read.
        random_state = q.new_zeros(2, dtype=torch.uint64), q.new_empty(0)
        layout = runs.cu_q, runs.cu_k, runs.max_q, runs.max_k, 0.0, runs.plain
        gradients: Gradients = torch.ops.aten._flash_attention_backward(
            d_out, q, k, v, out, lse, *layout, *random_state, scale=scale, **window
        )
        return gradients

    return Provider("PyTorch", forward, backward)


def _empty_gradients(q: Tensor, k: Tensor, v: Tensor) -> Gradients:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


PROVIDERS = (_flash_attn_4, _flash_attn_3, _flash_attn_2, _of_pytorch, _of_hub)
"""The functions that look for a FlashAttention, the fastest first."""
COMPILED_AT_FIRST = (_flash_attn_4,)
"""Those whose kernels are compiled at the first call."""


@cache
def _provider(gradients: bool) -> Provider | None:
    finders = sorted(PROVIDERS, key=lambda find: find in COMPILED_AT_FIRST and not gradients)
    return next(filter(None, (find() for find in finders)), None)

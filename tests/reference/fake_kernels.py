"""Stand-ins in plain torch for kernels that need a GPU or another package, with the same names and signatures.

They assert the requirements of the real kernels. Sources: FlashAttention 2 from flash_attn/flash_attn_interface.py and
3 from hopper/flash_api_stable.cpp of github.com/Dao-AILab/flash-attention; PyTorch's operators from its own schemas and
flash_api.cpp; the scan from mamba_ssm/ops/selective_scan_interface.py and csrc/selective_scan/selective_scan.cpp of
github.com/state-spaces/mamba; the convolution from csrc/causal_conv1d.cpp of github.com/Dao-AILab/causal-conv1d.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.library import Library
from torch.nn.functional import silu, softplus

FLASH_ATTN_3 = (
    "fwd(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new=None, Tensor(v_new!)? v_new=None, Tensor? q_v=None,"
    " Tensor(out!)? out=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? cu_seqlens_k_new=None,"
    " Tensor? seqused_q=None, Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None,"
    " Tensor? page_table=None, Tensor? kv_batch_idx=None, Tensor? leftpad_k=None, Tensor? rotary_cos=None,"
    " Tensor? rotary_sin=None, Tensor? seqlens_rotary=None, Tensor? q_descale=None, Tensor? k_descale=None,"
    " Tensor? v_descale=None, float? softmax_scale=None, bool is_causal=False, int window_size_left=-1,"
    " int window_size_right=-1, int attention_chunk=0, float softcap=0.0, bool is_rotary_interleaved=False,"
    " Tensor? scheduler_metadata=None, int num_splits=0, bool? pack_gqa=None, int sm_margin=0)"
    " -> (Tensor(out!), Tensor, Tensor, Tensor)",
    "bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(dq!)? dq=None,"
    " Tensor(dk!)? dk=None, Tensor(dv!)? dv=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None,"
    " Tensor? seqused_q=None, Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None,"
    " float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, int window_size_right=-1,"
    " float softcap=0.0, bool deterministic=False, int sm_margin=0)"
    " -> (Tensor(dq!), Tensor(dk!), Tensor(dv!), Tensor, Tensor, Tensor, Tensor, Tensor)",
)


class Layout:
    """The layout of the runs in a call of FlashAttention, with the checks of the kernels."""

    def __init__(self, cu_q: Tensor, cu_k: Tensor, most: tuple[int, int], causal: bool, left: int, right: int) -> None:
        self.offsets = cu_q.tolist(), cu_k.tolist()
        lengths = [[end - begin for begin, end in pairwise(offsets)] for offsets in self.offsets]
        assert cu_q.dtype == cu_k.dtype == torch.int32
        assert most == (max(lengths[0]), max(lengths[1]))
        assert min(lengths[0]) > 0  # the kernels' code path for runs of one query fails for an empty run
        self.left, self.right = left, 0 if causal else right

    def runs(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yield the rows of queries and of keys of each run, and a ``(queries, keys)`` mask of the hidden keys."""
        for (q, q_end), (k, k_end) in zip(*map(pairwise, self.offsets), strict=True):
            # The kernels align the last query with the last key.
            ahead = torch.arange(k_end - k) - torch.arange(q_end - q)[:, None] - (k_end - k) + (q_end - q)
            hidden = (ahead > self.right) & (self.right >= 0) | (-ahead > self.left) & (self.left >= 0)
            yield slice(q, q_end), slice(k, k_end), hidden


def flash_forward(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float) -> tuple[Tensor, Tensor]:
    """Return the attention ``(queries, H, a)`` of runs, and the logarithm of its denominator ``(H, queries)``."""
    _check_heads(q, k, v)
    dtype = q.dtype
    q, k, v = _wide(q, k, v)
    out, lse = torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0])
    for queries, keys, hidden in layout.runs():
        scores = _scores(q[queries], k[keys], hidden, scale)
        lse[:, queries] = scores.logsumexp(-1)
        out[queries] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), _per_head(v[keys], q))
    return out.to(dtype), lse


def flash_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, layout: Layout, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v from the given out and lse, as the kernels compute them."""
    _check_heads(q, k, v)
    assert d_out.shape == out.shape == q.shape
    assert d_out.dtype == out.dtype == q.dtype
    assert d_out.stride(-1) == out.stride(-1) == 1
    assert lse.shape == (q.shape[1], q.shape[0])
    assert lse.dtype == torch.promote_types(q.dtype, torch.float32)
    assert lse.is_contiguous()
    dtype = q.dtype
    d_out, q, k, v, out = _wide(d_out, q, k, v, out)
    d_q, d_k, d_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for queries, keys, hidden in layout.runs():
        weights = (_scores(q[queries], k[keys], hidden, scale) - lse[:, queries, None]).exp()
        inner = (d_out[queries] * out[queries]).sum(-1).T[..., None]
        d_weights = torch.einsum("qhd,khd->hqk", d_out[queries], _per_head(v[keys], q))
        d_scores = weights * (d_weights - inner) * scale
        d_q[queries] = torch.einsum("hqk,khd->qhd", d_scores, _per_head(k[keys], q))
        d_k[keys] += _per_group(torch.einsum("hqk,qhd->khd", d_scores, q[queries]), k)
        d_v[keys] += _per_group(torch.einsum("hqk,qhd->khd", weights, d_out[queries]), v)
    return d_q.to(dtype), d_k.to(dtype), d_v.to(dtype)


def _wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Convert to float32 at least, in which the kernels compute."""
    return tuple(x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors)


def _check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    assert q.shape[-1] == k.shape[-1] == v.shape[-1], "FlashAttention 2 takes heads of one width"
    assert k.shape == v.shape
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    assert q.shape[-1] % 8 == 0


def _scores(q: Tensor, k: Tensor, hidden: Tensor, scale: float) -> Tensor:
    scores = torch.einsum("qhd,khd->hqk", q, _per_head(k, q)) * scale
    return scores.masked_fill(hidden, float("-inf"))


def _per_head(x: Tensor, q: Tensor) -> Tensor:
    return x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def _per_group(x: Tensor, k: Tensor) -> Tensor:
    return x.unflatten(1, (k.shape[1], -1)).sum(2)


def register_aten() -> Library:
    """Register CPU kernels for PyTorch's operators, which have none, until the result is destroyed."""

    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cum_seq_q: Tensor,
        cum_seq_k: Tensor,
        max_q: int,
        max_k: int,
        dropout_p: float,
        is_causal: bool,
        return_debug_mask: bool,
        *,
        scale: float,
        window_size_left: int,
        window_size_right: int,
        **_more: Any,
    ) -> tuple[Tensor, ...]:
        assert (dropout_p, return_debug_mask) == (0, False)
        layout = Layout(cum_seq_q, cum_seq_k, (max_q, max_k), is_causal, window_size_left, window_size_right)
        out, lse = flash_forward(query, key, value, layout, scale)
        return out, lse, *(torch.empty(0) for _ in range(3))

    def backward(
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        logsumexp: Tensor,
        cum_seq_q: Tensor,
        cum_seq_k: Tensor,
        max_q: int,
        max_k: int,
        dropout_p: float,
        is_causal: bool,
        rng_state: Tensor,
        unused: Tensor,
        *,
        scale: float,
        window_size_left: int,
        window_size_right: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert dropout_p == 0
        assert rng_state.dtype == torch.uint64
        assert not unused.numel()
        layout = Layout(cum_seq_q, cum_seq_k, (max_q, max_k), is_causal, window_size_left, window_size_right)
        return flash_backward(grad_out, query, key, value, out, logsumexp, layout, scale)

    library = Library("aten", "IMPL")
    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    return library


def register_flash_attn_3() -> Library:
    """Define the operators of FlashAttention 3 as its extension does, until the result is destroyed."""

    def fwd(*arguments: Any) -> tuple[Tensor, ...]:
        named = _named("fwd", arguments)
        assert named["num_splits"] == 1
        layout = _flash_attn_layout(named, "is_causal")
        out, lse = flash_forward(named["q"], named["k"], named["v"], layout, named["softmax_scale"])
        return out, lse, torch.empty(0), torch.empty(0)

    def bwd(*arguments: Any) -> tuple[Tensor, ...]:
        named = _named("bwd", arguments)
        layout = _flash_attn_layout(named, "is_causal")
        saved = (named[name] for name in ("dout", "q", "k", "v", "out", "softmax_lse"))
        computed = flash_backward(*saved, layout, named["softmax_scale"])
        gradients = named["dq"], named["dk"], named["dv"]
        for gradient, value in zip(gradients, computed, strict=True):
            gradient.copy_(value)
        return *gradients, *(torch.empty(0) for _ in range(5))

    def _named(operator: str, arguments: tuple[Any, ...]) -> dict[str, Any]:
        """Return the arguments by name: the dispatcher passes them by position and omits defaults."""
        declared = getattr(torch.ops.flash_attn_3, operator).default._schema.arguments
        named = {argument.name: argument.default_value for argument in declared}
        return named | dict(zip(named, arguments, strict=False))

    library = Library("flash_attn_3", "DEF")
    for schema, function in zip(FLASH_ATTN_3, (fwd, bwd), strict=True):
        library.define(schema)
        library.impl(schema.partition("(")[0], function, "CPU")
    return library


def _flash_attn_layout(named: dict[str, Any], causal: str) -> Layout:
    most = named["max_seqlen_q"], named["max_seqlen_k"]
    window = named["window_size_left"], named["window_size_right"]
    return Layout(named["cu_seqlens_q"], named["cu_seqlens_k"], most, named[causal], *window)


def flash_attn_modules() -> list[ModuleType]:
    """Return the modules of the package flash-attn, version 2.7 or later."""

    def _flash_attn_varlen_forward(
        q: Tensor, k: Tensor, v: Tensor, *, dropout_p: float, softmax_scale: float, **named: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        assert dropout_p == 0
        out, lse = flash_forward(q, k, v, _flash_attn_layout(named, "causal"), softmax_scale)
        return out, lse, torch.empty(0), torch.empty(2)

    def _flash_attn_varlen_backward(
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        softmax_lse: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        *,
        dropout_p: float,
        softmax_scale: float,
        softcap: float,
        alibi_slopes: Tensor | None,
        deterministic: bool,
        **named: Any,
    ) -> Tensor:
        assert (dropout_p, softcap, alibi_slopes, deterministic) == (0, 0, None, False)
        layout = _flash_attn_layout(named, "causal")
        computed = flash_backward(dout, q, k, v, out, softmax_lse, layout, softmax_scale)
        for gradient, value in zip((dq, dk, dv), computed, strict=True):
            gradient.copy_(value)
        return torch.empty(0)

    package = ModuleType("flash_attn")
    interface = ModuleType("flash_attn.flash_attn_interface")
    vars(interface).update(
        _flash_attn_varlen_forward=_flash_attn_varlen_forward, _flash_attn_varlen_backward=_flash_attn_varlen_backward
    )
    return [package, interface]


def flash_attn_4_modules() -> list[ModuleType]:
    """Return the modules of the package flash-attn-4, which is in a folder of flash_attn."""

    def layout(named: dict[str, Any]) -> Layout:
        left, right = (-1 if named[side] is None else named[side] for side in ("window_size_left", "window_size_right"))
        assert not named["causal"] or (left, right) == (-1, -1)
        sides = {"window_size_left": left, "window_size_right": 0 if named["causal"] else right}
        return _flash_attn_layout(named | sides, "causal")

    def _flash_attn_fwd(
        q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, return_lse: bool, **named: Any
    ) -> tuple[Tensor, Tensor]:
        assert return_lse
        return flash_forward(q, k, v, layout(named), softmax_scale)

    def _flash_attn_bwd(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        dout: Tensor,
        lse: Tensor,
        *,
        softmax_scale: float,
        deterministic: bool,
        **named: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert not deterministic
        assert out.shape == dout.shape == (*q.shape[:2], v.shape[-1])
        d_q, d_k, d_v = flash_backward(dout, q, k, v, out, lse, layout(named), softmax_scale)
        return d_q, d_k, d_v

    package, cute = ModuleType("flash_attn"), ModuleType("flash_attn.cute")
    interface = ModuleType("flash_attn.cute.interface")
    cute.interface = interface
    vars(interface).update(_flash_attn_fwd=_flash_attn_fwd, _flash_attn_bwd=_flash_attn_bwd)
    return [package, cute, interface]


def mamba_ssm_modules() -> list[ModuleType]:
    """Return the modules of the package mamba-ssm, built with its Mamba-1 scan."""
    interface = ModuleType("mamba_ssm.ops.selective_scan_interface")
    vars(interface).update(selective_scan_fn=selective_scan_fn)
    names = "mamba_ssm", "mamba_ssm.ops", "selective_scan_cuda"
    return [*map(ModuleType, names), interface]


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor:
    """Compute the scan of mamba-ssm for rows ``(batch, channels, length)``, B and C ``(batch, N, length)``."""
    batch, channels, length = u.shape
    assert not return_last_state  # it has no gradient
    assert delta_softplus
    assert A.shape == (channels, B.shape[1])
    assert A.shape[1] <= 256
    for row in filter(lambda x: x is not None, (u, delta, z)):
        assert row.shape == (batch, channels, length)
        assert row.dtype == u.dtype
        assert row.stride(-1) == 1
    for projection in (B, C):
        assert projection.shape == (batch, A.shape[1], length)
        assert projection.dtype == u.dtype
        assert projection.stride(-1) == 1
    # The kernel requires float32 for these, whatever the dtype of the rows; the tests use float64 instead.
    assert {x.dtype for x in (A, D, delta_bias) if x is not None} <= {torch.float32, torch.float64}
    delta = softplus(delta if delta_bias is None else delta + delta_bias[:, None])
    state = u.new_zeros(batch, channels, A.shape[1])
    outputs = []
    for t in range(length):
        state = torch.exp(delta[:, :, t, None] * A) * state + (delta * u)[:, :, t, None] * B[:, None, :, t]
        outputs.append((state * C[:, None, :, t]).sum(-1))
    y = torch.stack(outputs, -1) if outputs else u
    y = y if D is None else y + D[:, None] * u
    return (y if z is None else y * silu(z)).to(u.dtype)


def causal_conv1d_modules() -> list[ModuleType]:
    """Return the module of the package causal-conv1d."""
    package = ModuleType("causal_conv1d")
    vars(package).update(causal_conv1d_fn=causal_conv1d_fn)
    return [package]


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Compute the convolution of causal-conv1d for x ``(batch, channels, length)`` with one contiguous axis."""
    assert activation in (None, "silu", "swish")
    assert not return_final_states
    assert final_states_out is None
    batch, channels, length = x.shape
    width = weight.shape[1]
    assert weight.shape == (channels, width)
    assert 2 <= width <= 4
    assert x.stride(2) == 1 or x.stride(1) == 1
    channels_last = x.stride(1) == 1 and x.stride(2) > 1
    if channels_last:
        assert channels % 8 == 0
        assert x.stride(2) % 8 == x.stride(0) % 8 == 0
        assert x.data_ptr() % 16 == 0  # the kernel reads 16 bytes at a time without a check
    if bias is not None:
        assert bias.dtype == weight.dtype
        assert bias.stride(-1) == 1
    if seq_idx is not None:
        assert channels_last
        assert initial_states is None
        assert seq_idx.shape == (batch, length)
        assert seq_idx.dtype == torch.int32
    if initial_states is not None:
        assert channels_last
        assert initial_states.shape == (batch, channels, width - 1)
        assert initial_states.stride(1) == 1
        assert initial_states.dtype == x.dtype
    before = x.new_zeros(batch, channels, width - 1) if initial_states is None else initial_states
    windows = torch.cat([before, x], -1).unfold(-1, width, 1)
    if seq_idx is not None:
        own = torch.nn.functional.pad(seq_idx, (width - 1, 0), value=-1).unfold(-1, width, 1) == seq_idx[..., None]
        windows = windows * own[:, None]
    y = (windows * weight[:, None].to(x.dtype)).sum(-1)
    y = y if bias is None else y + bias[:, None].to(x.dtype)
    return y if activation is None else silu(y)

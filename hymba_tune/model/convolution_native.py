"""The causal depthwise convolution and the silu behind it in C++ for the CPU, over many texts at once.

Glossary: T tokens, S texts, E channels, K width of the convolution.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .backends import Task
from .native import Arguments, Library, Rows, fields, readable, threads_for
from .native_vectors import VECTORS

WIDEST = 4
"""The widest convolution that is compiled."""

SOURCE = (
    VECTORS
    + r"""
// W channels stand side by side in a vector, GROUP channels are one unit of work. A group goes through the texts CHUNK
// tokens at a time, one block of W channels after the other: neighbors in a row are then read close to each other.

constexpr int GROUP = 64, CHUNK = 32;

namespace {

struct Convolution {
    int64_t texts, E, K, threads, fuses_meta_prefix, silu;
    // fuses_meta_prefix: texts after the first follow on the first's last inputs
    const int64_t *offsets;
    Rows x, y, dy, dx;
    const float *taps, *bias;  // (K, E): the last meets the token itself
    float *d_taps, *d_bias;
};

// W channels, their last K inputs, the latest first, and in the backward the gradients of those.
template <int K> struct Block {
    const Convolution *p;
    int64_t column;
    int lanes;
    V taps[K], bias{}, x[K]{}, dx[K]{}, d_taps[K]{}, d_bias{}, d_first[K]{};

    void begin(const Convolution &convolution, int64_t at) {
        p = &convolution, column = at, lanes = (int)std::min<int64_t>(W, p->E - at);
        for (int k = 0; k < K; k++) taps[k] = load(p->taps + (K - 1 - k) * p->E + column, lanes);
        if (p->bias) bias = load(p->bias + column, lanes);
    }

    V read(const Rows &from, int64_t t) const { return load(from, t, column, lanes); }

    // Stand in front of a text.
    void enter(int64_t text) {
        bool follows = p->fuses_meta_prefix && text;
        for (int k = 0; k < K; k++) {
            x[k] = follows && p->offsets[1] > k ? read(p->x, p->offsets[1] - 1 - k) : V{};
            dx[k] = V{};
        }
    }

    static void advance(V *window, V next) {
        for (int k = K - 1; k > 0; k--) window[k] = window[k - 1];
        window[0] = next;
    }

    V product() const {
        V y = bias;
        for (int k = 0; k < K; k++) y += taps[k] * x[k];
        return y;
    }

    // Both work on a copy: what is stored might be the block itself, for all the compiler knows.
    void forward(int64_t, int64_t from, int64_t to) {
        Block own = *this;
        for (int64_t t = from; t < to; t++) {
            advance(own.x, own.read(own.p->x, t));
            V y = own.product();
            store(own.p->y, t, own.column, own.lanes, own.p->silu ? y * sigmoid(y) : y);
        }
        *this = own;
    }

    void backward(int64_t text, int64_t from, int64_t to) {
        Block own = *this;
        own.back(text, from, to);
        *this = own;
    }

    // Through tokens of a text and K - 1 steps beyond it: at t, the gradient of the input at t - (K - 1) is complete.
    inline __attribute__((always_inline)) void back(int64_t text, int64_t from, int64_t to) {
        int64_t begin = p->offsets[text], end = p->offsets[text + 1];
        for (int64_t t = from; t < to; t++) {
            advance(dx, V{});
            if (t < end) {
                advance(x, read(p->x, t));
                V dy = read(p->dy, t);
                if (p->silu) {
                    V y = product(), s = sigmoid(y);
                    dy *= s * (1.f + y * (1.f - s));
                }
                d_bias += dy;
                for (int k = 0; k < K; k++) d_taps[k] += dy * x[k], dx[k] += dy * taps[k];
            }
            int64_t done = t - (K - 1);
            if (done < begin) {
                if (p->fuses_meta_prefix && text) d_first[begin - done] += dx[K - 1];
            } else {
                V total = dx[K - 1];
                if (p->fuses_meta_prefix && !text && end - done < K) total += d_first[end - done];
                store(p->dx, done, column, lanes, total);
            }
        }
    }

    void finish() const {
        for (int k = 0; k < K; k++) copy<float>(p->d_taps + (K - 1 - k) * p->E + column, &d_taps[k], lanes);
        if (p->bias) copy<float>(p->d_bias + column, &d_bias, lanes);
    }
};

// A group's blocks through all texts, the first text last in the backward: it gets gradients from the others.
template <int K, bool BACK> void go_through(const Convolution &p, int64_t group) {
    std::vector<Block<K>> blocks((std::min<int64_t>(GROUP, p.E - group * GROUP) + W - 1) / W);
    for (size_t i = 0; i < blocks.size(); i++) blocks[i].begin(p, group * GROUP + i * W);
    for (int64_t nth = 0; nth < p.texts; nth++) {
        int64_t text = BACK ? p.texts - 1 - nth : nth, end = p.offsets[text + 1] + (BACK ? K - 1 : 0);
        for (auto &block : blocks) block.enter(text);
        for (int64_t from = p.offsets[text]; from < end; from += CHUNK)
            for (auto &block : blocks) {
                if (BACK) block.backward(text, from, std::min(from + CHUNK, end));
                else block.forward(text, from, std::min(from + CHUNK, end));
            }
    }
    for (auto &block : blocks)
        if (BACK) block.finish();
}

template <bool BACK> void convolve(const Convolution &p) {
    auto of_width = p.K == 4   ? go_through<4, BACK>
                    : p.K == 3 ? go_through<3, BACK>
                    : p.K == 2 ? go_through<2, BACK>
                               : go_through<1, BACK>;
    parallel(p.threads, (p.E + GROUP - 1) / GROUP, [&](int64_t group) { of_width(p, group); });
}

}  // namespace

extern "C" void forward(const Convolution *p) { convolve<false>(*p); }
extern "C" void backward(const Convolution *p) { convolve<true>(*p); }
"""
)
LIBRARY = Library("convolution", SOURCE)


def native_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    offsets: tuple[int, ...] | None = None,
    fuses_meta_prefix: bool = False,
    silu: bool = False,
) -> Tensor:
    """Convolve texts that begin from zeros.

    Args:
        x: ``(T, E)``, float32 or bfloat16.
        weight: ``(E, K)``, K up to `WIDEST`.
        bias: ``(E,)`` or None.
        offsets: Where each text begins among the T tokens, and T; one text when not given.
        fuses_meta_prefix: Whether the texts after the first begin from its last inputs instead.
        silu: Whether silu follows.

    Returns:
        ``(T, E)`` in x's dtype.
    """
    layout = offsets or (0, x.shape[0]), fuses_meta_prefix, silu
    y: Tensor = _NativeConvolution.apply(readable(x), weight, bias, layout)
    return y


def native_unsupported_reason(task: Task) -> str | None:
    """Why a task cannot be taken, or None if it can."""
    return None if task.taps <= WIDEST else f"the width must be at most {WIDEST}, not {task.taps}"


class _Arguments(Arguments):
    _fields_ = (
        *fields(ctypes.c_int64, "texts E K threads fuses_meta_prefix silu"),
        *fields(ctypes.c_void_p, "offsets"),
        *fields(Rows, "x y dy dx"),
        *fields(ctypes.c_void_p, "taps bias d_taps d_bias"),
    )


class _NativeConvolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layout: tuple[tuple[int, ...], bool, bool]
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.layout = layout
        y = x.new_empty(x.shape)
        _call("forward", x, weight, bias, layout, y=y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        dx = x.new_empty(x.shape)
        d_taps = torch.empty(weight.shape[::-1], dtype=torch.float32)
        d_bias = None if bias is None else torch.empty(bias.shape, dtype=torch.float32)
        _call("backward", x, weight, bias, ctx.layout, dy=readable(dy), dx=dx, d_taps=d_taps, d_bias=d_bias)
        return dx, d_taps.t().to(weight.dtype), None if bias is None or d_bias is None else d_bias.to(bias.dtype), None


def _call(
    function: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layout: tuple[tuple[int, ...], bool, bool],
    **others: Tensor | None,
) -> None:
    offsets, fuses_meta_prefix, silu = layout
    texts = (ctypes.c_int64 * len(offsets))(*offsets)
    arguments = _Arguments(
        texts=len(offsets) - 1,
        E=x.shape[1],
        K=weight.shape[1],
        threads=threads_for(weight.shape[1] * x.numel()),
        fuses_meta_prefix=fuses_meta_prefix,
        silu=silu,
        offsets=ctypes.addressof(texts),
        x=x,
        taps=weight.float().t().contiguous(),
        bias=None if bias is None else bias.float().contiguous(),
        **others,
    )
    LIBRARY.call(function, arguments)

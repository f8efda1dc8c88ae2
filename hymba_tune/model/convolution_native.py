"""The causal depthwise convolution and the silu after it in C++ for the CPU, over many texts at once.

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
"""The widest convolution that the C++ supports."""

SOURCE = (
    VECTORS
    + r"""
// A vector holds W adjacent channels, and GROUP channels are one unit of work. A group processes the texts CHUNK tokens
// at a time, one block of W channels after the other, so that neighbors in a row are read close to each other in time.

constexpr int GROUP = 64, CHUNK = 32;

namespace {

struct Convolution {
    int64_t texts, E, K, threads, fuses_meta_prefix, silu;
    // fuses_meta_prefix: the texts after the first continue from the last inputs of the first
    const int64_t *offsets;
    Rows x, y, dy, dx;
    const float *taps, *bias;  // taps are (K, E); the last one is multiplied with the token itself
    float *d_taps, *d_bias;
};

// W channels, their last K inputs, the latest one first, and in the backward the gradients of these inputs.
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

    // Loads the inputs before the first token of a text.
    void start_text(int64_t text) {
        bool continues = p->fuses_meta_prefix && text;
        for (int k = 0; k < K; k++) {
            x[k] = continues && p->offsets[1] > k ? read(p->x, p->offsets[1] - 1 - k) : V{};
            dx[k] = V{};
        }
    }

    static void push(V *window, V next) {
        for (int k = K - 1; k > 0; k--) window[k] = window[k - 1];
        window[0] = next;
    }

    V product() const {
        V y = bias;
        for (int k = 0; k < K; k++) y += taps[k] * x[k];
        return y;
    }

    // Both methods work on a copy, because for the compiler a store could otherwise alias the block itself.
    void forward(int64_t, int64_t from, int64_t to) {
        Block block = *this;
        for (int64_t t = from; t < to; t++) {
            push(block.x, block.read(block.p->x, t));
            V y = block.product();
            store(block.p->y, t, block.column, block.lanes, block.p->silu ? y * sigmoid(y) : y);
        }
        *this = block;
    }

    void backward(int64_t text, int64_t from, int64_t to) {
        Block block = *this;
        block.backward_steps(text, from, to);
        *this = block;
    }

    // Runs over tokens of a text and K - 1 steps beyond. After step t, the gradient of input t - (K - 1) is complete.
    inline __attribute__((always_inline)) void backward_steps(int64_t text, int64_t from, int64_t to) {
        int64_t begin = p->offsets[text], end = p->offsets[text + 1];
        for (int64_t t = from; t < to; t++) {
            push(dx, V{});
            if (t < end) {
                push(x, read(p->x, t));
                V dy = read(p->dy, t);
                if (p->silu) {
                    V y = product(), s = sigmoid(y);
                    dy *= s * (1.f + y * (1.f - s));
                }
                d_bias += dy;
                for (int k = 0; k < K; k++) d_taps[k] += dy * x[k], dx[k] += dy * taps[k];
            }
            int64_t complete = t - (K - 1);
            if (complete < begin) {
                if (p->fuses_meta_prefix && text) d_first[begin - complete] += dx[K - 1];
            } else {
                V total = dx[K - 1];
                if (p->fuses_meta_prefix && !text && end - complete < K) total += d_first[end - complete];
                store(p->dx, complete, column, lanes, total);
            }
        }
    }

    void store_weight_gradients() const {
        for (int k = 0; k < K; k++) copy<float>(p->d_taps + (K - 1 - k) * p->E + column, &d_taps[k], lanes);
        if (p->bias) copy<float>(p->d_bias + column, &d_bias, lanes);
    }
};

// Runs the blocks of a group over all texts. The backward ends with the first text, which gets gradients from others.
template <int K, bool BACKWARD> void run_group(const Convolution &p, int64_t group) {
    std::vector<Block<K>> blocks((std::min<int64_t>(GROUP, p.E - group * GROUP) + W - 1) / W);
    for (size_t i = 0; i < blocks.size(); i++) blocks[i].begin(p, group * GROUP + i * W);
    for (int64_t nth = 0; nth < p.texts; nth++) {
        int64_t text = BACKWARD ? p.texts - 1 - nth : nth, end = p.offsets[text + 1] + (BACKWARD ? K - 1 : 0);
        for (auto &block : blocks) block.start_text(text);
        for (int64_t from = p.offsets[text]; from < end; from += CHUNK)
            for (auto &block : blocks) {
                if (BACKWARD) block.backward(text, from, std::min(from + CHUNK, end));
                else block.forward(text, from, std::min(from + CHUNK, end));
            }
    }
    for (auto &block : blocks)
        if (BACKWARD) block.store_weight_gradients();
}

template <bool BACKWARD> void convolve(const Convolution &p) {
    auto run = p.K == 4   ? run_group<4, BACKWARD>
               : p.K == 3 ? run_group<3, BACKWARD>
               : p.K == 2 ? run_group<2, BACKWARD>
                          : run_group<1, BACKWARD>;
    parallel(p.threads, (p.E + GROUP - 1) / GROUP, [&](int64_t group) { run(p, group); });
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
    """Convolve texts that start from zeros.

    Args:
        x: ``(T, E)``, float32 or bfloat16.
        weight: ``(E, K)``, K up to `WIDEST`.
        bias: ``(E,)`` or None.
        offsets: The index of the first token of each text, followed by T. The default is one text.
        fuses_meta_prefix: Whether the texts after the first start from its last inputs instead.
        silu: Whether to apply silu to the result.

    Returns:
        ``(T, E)`` in x's dtype.
    """
    layout = offsets or (0, x.shape[0]), fuses_meta_prefix, silu
    y: Tensor = _NativeConvolution.apply(readable(x), weight, bias, layout)
    return y


def native_unsupported_reason(task: Task) -> str | None:
    """Return why the convolution of a task is not supported, or None if it is."""
    return None if task.taps <= WIDEST else f"the width of the convolution must be at most {WIDEST}, not {task.taps}"


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

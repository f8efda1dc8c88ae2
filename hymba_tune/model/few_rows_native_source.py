"""The C++ source of matrix products of a few rows, which `few_rows_native` compiles."""

from .native_vectors import VECTORS

SOURCE = (
    VECTORS
    + r"""
// Products of a few rows with large weights, whose time is that of reading the weights.
//
// The sum of each number of the result has an order of its own, which depends only on the width: neither the other rows
// nor the number of threads change it.

namespace {

struct Product {
    int64_t rows, width, outputs, threads;
    Rows x, weight, bias;  // (rows, width), (outputs, width); (1, outputs) or null
    Rows up;               // the weight of a second product, or null: then the result is silu(first) * second
    Rows residual;         // (rows, outputs), added to the result, or null
    Rows y;                // (rows, outputs)
};

// The rows of the weight that are read at once, so that several reads are on their way, and the rows of x that are
// multiplied with them, as many as there are registers for sums.
#if defined(__AVX512F__)
constexpr int STREAMS = 8, TOGETHER = 4;
#else
constexpr int STREAMS = 4, TOGETHER = 2;
#endif
constexpr int64_t AHEAD = 4096;  // how many bytes before their use numbers are fetched into the second cache
constexpr int64_t UNIT = 32;     // the number of rows of the weight of a unit of work

// Some adjacent numbers of a row, as they are multiplied.
template <class Element> struct Part {
    static constexpr int LANES = W;
    V v;
    Part() {}
    Part(const Element *x, int lanes) : v(load(x, lanes)) {}
    V added(V sum, const Part &other) const { return sum + v * other.v; }
};

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
template <> struct Part<uint16_t> {
    static constexpr int LANES = 2 * W;
    __m512i v;
    Part() {}
    Part(const uint16_t *x, int lanes) : v(_mm512_maskz_loadu_epi16(~(__mmask32)0 >> (LANES - lanes), x)) {}
    V added(V sum, const Part &other) const { return _mm512_dpbf16_ps(sum, (__m512bh)v, (__m512bh)other.v); }
};
#endif

// Multiplies S rows of a weight by R rows of x; product s of row r goes to to[r * UNIT + s].
template <class Element, int S, int R>
void multiply(const Element *x, int64_t x_stride, const Element *weight, int64_t stride, int64_t width, float *to) {
    constexpr int LANES = Part<Element>::LANES;
    V sums[S][R]{};
    auto add = [&](int64_t column, int lanes) INLINE {
        Part<Element> own[R];
        unrolled<R>([&](int r) INLINE { own[r] = Part<Element>(x + r * x_stride + column, lanes); });
        unrolled<S>([&](int s) INLINE {
            const Element *at = weight + s * stride + column;
            __builtin_prefetch((const char *)at + AHEAD, 0, 2);
            Part<Element> part(at, lanes);
            unrolled<R>([&](int r) INLINE { sums[s][r] = part.added(sums[s][r], own[r]); });
        });
    };
    int64_t column = 0;
    for (; column + LANES <= width; column += LANES) add(column, LANES);
    if (column < width) add(column, (int)(width - column));
    unrolled<S>([&](int s) INLINE {
        unrolled<R>([&](int r) INLINE { to[r * UNIT + s] = sum(sums[s][r]); });
    });
}

// Multiplies some rows of a weight by all rows of x.
template <class Element, int S>
void multiply_rows(const Product &p, const Rows &weight, int64_t output, float *to) {
    const Element *own = (const Element *)weight.data + output * weight.stride;
    for (int64_t row = 0; row < p.rows; row += TOGETHER) {
        const Element *x = (const Element *)p.x.data + row * p.x.stride;
        auto run = [&](auto multiply) { multiply(x, p.x.stride, own, weight.stride, p.width, to + row * UNIT); };
        switch (std::min<int64_t>(TOGETHER, p.rows - row)) {
            case 1: run(multiply<Element, S, 1>); break;
            case 2: run(multiply<Element, S, 2>); break;
#if defined(__AVX512F__)
            case 3: run(multiply<Element, S, 3>); break;
            default: run(multiply<Element, S, 4>);
#endif
        }
    }
}

template <class Element>
void multiply_unit(const Product &p, const Rows &weight, int64_t begin, int64_t end, float *to) {
    int64_t output = begin;
    for (; output + STREAMS <= end; output += STREAMS)
        multiply_rows<Element, STREAMS>(p, weight, output, to + output - begin);
    for (; output < end; output++) multiply_rows<Element, 1>(p, weight, output, to + output - begin);
}

void multiply_unit(const Product &p, const Rows &weight, int64_t begin, int64_t end, float *to) {
    if (weight.bf16) multiply_unit<uint16_t>(p, weight, begin, end, to);
    else multiply_unit<float>(p, weight, begin, end, to);
}

}  // namespace

extern "C" void product(const Product *p) {
    parallel(p->threads, (p->outputs + UNIT - 1) / UNIT, [=](int64_t unit) {
        int64_t begin = unit * UNIT, end = std::min(begin + UNIT, p->outputs);
        std::vector<float> memory(2 * p->rows * UNIT);
        float *first = memory.data(), *second = first + p->rows * UNIT;
        multiply_unit(*p, p->weight, begin, end, first);
        if (p->up.data) multiply_unit(*p, p->up, begin, end, second);
        for (int64_t r = 0; r < p->rows; r++)
            each_vector(end - begin, [&](int64_t c, int lanes) {
                V y = load(first + r * UNIT + c, lanes) + load(p->bias, 0, begin + c, lanes);
                if (p->up.data) {
                    V gate = rounded(y, p->y.bf16);
                    y = gate * sigmoid(gate) * rounded(load(second + r * UNIT + c, lanes), p->y.bf16);
                }
                store(p->y, r, begin + c, lanes, y + load(p->residual, r, begin + c, lanes));
            });
    });
}
"""
)

"""The vectors that the native scan computes with, in C++."""

VECTORS = r"""
// W float32 numbers side by side, what is computed with them, and how they are read and written.

#include <cstdint>
#include <cstring>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float V __attribute__((vector_size(4 * W)));
typedef int32_t I __attribute__((vector_size(4 * W)));
typedef uint32_t U __attribute__((vector_size(4 * W)));
typedef uint16_t H __attribute__((vector_size(2 * W)));

constexpr float LOG2E = 1.44269504f, LN2 = 0.693147181f;

inline V splat(float x) { return x - V{}; }

// Within [low, high], or NaN.
inline V clamp(V x, float low, float high) {
#if defined(__AVX512F__)
    return _mm512_min_ps(splat(high), _mm512_max_ps(splat(low), x));
#elif defined(__AVX__)
    return _mm256_min_ps(splat(high), _mm256_max_ps(splat(low), x));
#else
    x = x < splat(low) ? splat(low) : x;
    return x > splat(high) ? splat(high) : x;
#endif
}

// 2^(k + f) for whole k from -127 to 128, where it is 0 and infinity, and |f| <= 1/2; rounded is k + ROUND.
constexpr float ROUND = 12582912 + 127;  // adding it rounds to a whole number and leaves the exponent's bits lowest
inline V pow2(V rounded, V f) {
    V p = f * 1.32647273e-3f + 9.67151299e-3f;  // least relative error, 9e-8
    p = p * f + 5.55073358e-2f;
    p = p * f + 2.40222424e-1f;
    p = p * f + 6.93147004e-1f;
    p = p * f + 1.f;
    return p * (V)((I)rounded << 23);
}

inline V exp2(V x) {
    x = clamp(x, -127, 128);
    V rounded = x + ROUND;
    return pow2(rounded, x - (rounded - ROUND));
}

inline V exp(V x) {
    x = clamp(x, -88, 89);
    V rounded = x * LOG2E + ROUND, k = rounded - ROUND;
    V f = (x - k * 0.693359375f) + k * 2.12194440e-4f;  // ln 2 in two parts, the first exact
    return pow2(rounded, f * LOG2E);
}

// Softplus and its slope, the sigmoid; both from exp(-|x|).
struct Softplus {
    V value, slope;
    explicit Softplus(V x) {
        V w = exp(x < 0.f ? x : -x), s = w / (w + 2.f), q = s * s;
        V p = q * 1.21504687e-1f + 1.07138284e-1f;  // log(1 + w) = 2 atanh(s)
        p = p * q + 1.43084422e-1f;
        p = p * q + 1.99994385e-1f;
        p = p * q + 3.33333373e-1f;
        V log1p = (s + s) * (p * q + 1.f);
        value = x > splat(20) ? x : (x < 0.f ? V{} : x) + log1p;
        slope = (x < 0.f ? w : splat(1)) / (w + 1.f);
    }
};

inline V sigmoid(V x) { return Softplus(x).slope; }

// A matrix whose rows are contiguous; data is null where there is none.
struct Rows {
    void *data;
    int64_t stride, bf16;
};

template <class Element> inline void copy(void *to, const void *from, int lanes) {
    if (lanes == W) memcpy(to, from, W * sizeof(Element));  // a size known to the compiler is one instruction
    else memcpy(to, from, lanes * sizeof(Element));
}

inline V load(const float *x, int lanes) {
    V v{};
    copy<float>(&v, x, lanes);
    return v;
}

inline V load(const Rows &x, int64_t row, int64_t column, int lanes) {
    if (!x.data) return V{};
    int64_t place = row * x.stride + column;
    if (!x.bf16) return load((const float *)x.data + place, lanes);
    H half{};
    copy<uint16_t>(&half, (const uint16_t *)x.data + place, lanes);
    return (V)(__builtin_convertvector(half, U) << 16);
}

inline void store(const Rows &x, int64_t row, int64_t column, int lanes, V v) {
    int64_t place = row * x.stride + column;
    if (!x.bf16) return copy<float>((float *)x.data + place, &v, lanes);
    U bits = (U)v, even = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    H half = __builtin_convertvector((U)(v == v ? (I)even : I{} + 0x7fc0), H);
    copy<uint16_t>((uint16_t *)x.data + place, &half, lanes);
}

}  // namespace
"""

"""The C++ that all native backends share: vectors, and threads that divide the work."""

VECTORS = r"""
// Vectors of W float32 numbers, arithmetic on them, loads and stores, and threads.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <system_error>
#include <thread>
#include <vector>
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

// Limits x to [low, high]; NaN stays NaN.
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

// 2^f for |f| <= 1/2, with the least relative error, 9e-8.
inline V pow2_fraction(V f) {
    V p = f * 1.32647273e-3f + 9.67151299e-3f;
    p = p * f + 5.55073358e-2f;
    p = p * f + 2.40222424e-1f;
    p = p * f + 6.93147004e-1f;
    return p * f + 1.f;
}

#if defined(__AVX512DQ__)
inline V exp2(V x) {
    V f = _mm512_reduce_ps(x, 8);  // the remainder to the nearest whole number; 0 for infinity
    return _mm512_scalef_ps(pow2_fraction(f), x - f);
}

inline V exp(V x) {
    x = clamp(x, -104, 89);
    V k = _mm512_roundscale_ps(x * LOG2E, 8);
    V f = (x - k * 0.693359375f) + k * 2.12194440e-4f;  // ln 2 in two parts, the first exact
    return _mm512_scalef_ps(pow2_fraction(f * LOG2E), k);
}
#else
// 2^(k + f) for whole k from -127 to 128, where it is 0 and infinity, and |f| <= 1/2; rounded is k + ROUND.
constexpr float ROUND = 12582912 + 127;  // adding it rounds to a whole number and leaves the exponent's bits lowest
inline V pow2(V rounded, V f) { return pow2_fraction(f) * (V)((I)rounded << 23); }

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
#endif

// Softplus and its slope, the sigmoid; both are computed from exp(-|x|).
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

// A matrix with contiguous rows; data is null if there is no matrix.
struct Rows {
    void *data;
    int64_t stride, bf16;
};

// A tensor (rows, heads, width) with contiguous heads.
struct Grid {
    void *data;
    int64_t row, head, bf16;

    Rows at(int64_t r, int64_t h) const {
        int64_t offset = r * row + h * head;
        return {bf16 ? (void *)((uint16_t *)data + offset) : (void *)((float *)data + offset), 0, bf16};
    }
};

template <class Element> inline void copy(void *to, const void *from, int lanes) {
    if (lanes == W) memcpy(to, from, W * sizeof(Element));  // a constant size compiles to one instruction
    else memcpy(to, from, lanes * sizeof(Element));
}

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
inline __mmask16 first(int lanes) { return (__mmask16)((1u << lanes) - 1); }

inline V load(const float *x, int lanes) { return _mm512_maskz_loadu_ps(first(lanes), x); }
inline void store(float *x, int lanes, V v) { _mm512_mask_storeu_ps(x, first(lanes), v); }

inline V load(const uint16_t *x, int lanes) {
    return (V)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(lanes), x)), 16);
}

// Replaces all but the first lanes by a number.
inline V first_lanes(V v, int lanes, float other) { return _mm512_mask_mov_ps(splat(other), first(lanes), v); }
#else
inline V load(const float *x, int lanes) {
    V v{};
    copy<float>(&v, x, lanes);
    return v;
}
inline void store(float *x, int lanes, V v) { copy<float>(x, &v, lanes); }

inline V load(const uint16_t *x, int lanes) {
    H half{};
    copy<uint16_t>(&half, x, lanes);
    return (V)(__builtin_convertvector(half, U) << 16);
}

inline V first_lanes(V v, int lanes, float other) {
    for (int lane = lanes; lane < W; lane++) v[lane] = other;
    return v;
}
#endif

inline void store(uint16_t *x, int lanes, V v) {
#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
    _mm256_mask_storeu_epi16(x, first(lanes), (__m256i)_mm512_cvtneps_pbh(v));
#else
    U bits = (U)v, even = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    H half = __builtin_convertvector((U)(v == v ? (I)even : I{} + 0x7fc0), H);
    copy<uint16_t>(x, &half, lanes);
#endif
}

// The value of a number after it was stored in the format of a row.
inline V rounded(V v, int64_t bf16) {
    if (!bf16) return v;
    U bits = (U)v;
    return v == v ? (V)((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000) : v;
}

inline V load(const Rows &x, int64_t row, int64_t column, int lanes) {
    if (!x.data) return V{};
    int64_t offset = row * x.stride + column;
    return x.bf16 ? load((const uint16_t *)x.data + offset, lanes) : load((const float *)x.data + offset, lanes);
}

inline void store(const Rows &x, int64_t row, int64_t column, int lanes, V v) {
    int64_t offset = row * x.stride + column;
    if (x.bf16) store((uint16_t *)x.data + offset, lanes, v);
    else store((float *)x.data + offset, lanes, v);
}

// Calls `work` for each W columns of a row, with the first column and the number of columns.
template <class Work> inline void each_vector(int64_t width, Work work) {
    int64_t column = 0;
    for (; column + W <= width; column += W) work(column, W);
    if (column < width) work(column, (int)(width - column));
}

// The sum and the maximum of the lanes, by adding or comparing halves.
#if defined(__AVX512F__)
inline float sum(V v) { return _mm512_reduce_add_ps(v); }
inline float highest(V v) { return _mm512_reduce_max_ps(v); }
#else
inline float sum(V v) {
    for (int half = W / 2; half; half /= 2)
        for (int lane = 0; lane < half; lane++) v[lane] += v[lane + half];
    return v[0];
}

inline float highest(V v) {
    for (int half = W / 2; half; half /= 2)
        for (int lane = 0; lane < half; lane++) v[lane] = std::max(v[lane], v[lane + half]);
    return v[0];
}
#endif

#define INLINE __attribute__((always_inline))

// Calls `work` with 0 to N - 1, as constants: only then are arrays of sums kept in registers.
template <int N, class Work> inline INLINE void unrolled(const Work &work) {
    if constexpr (N > 0) {
        unrolled<N - 1>(work);
        work(N - 1);
    }
}

// States that decay become denormal numbers, and arithmetic on those is many times slower.
struct FlushDenormals {
#if defined(__SSE2__)
    unsigned saved = _mm_getcsr();
    FlushDenormals() { _mm_setcsr(saved | 0x8040); }
    ~FlushDenormals() { _mm_setcsr(saved); }
#endif
};

// A function that runs another one in a number of waiting threads: that of OpenMP if torch has loaded it, else null.
void (*run_in_threads)(void (*)(void *), void *, unsigned, unsigned) = nullptr;

template <class Work> void parallel(int64_t threads, int64_t items, Work work) {
    std::atomic<int64_t> next{0};
    auto run = [&] {
        FlushDenormals scope;
        for (int64_t item; (item = next++) < items;) work(item);
    };
    threads = std::min(threads, items);
    if (threads <= 1) return run();
    if (run_in_threads)
        return run_in_threads([](void *each) { (*(decltype(run) *)each)(); }, &run, (unsigned)threads, 0);
    std::vector<std::thread> others;
    try {
        while ((int64_t)others.size() + 1 < threads) others.emplace_back(run);
    } catch (const std::system_error &) {  // the system has no more threads; those that exist do the work
    }
    run();
    for (auto &other : others) other.join();
}

}  // namespace

extern "C" void share_threads(void *parallel) { run_in_threads = (decltype(run_in_threads))parallel; }
"""

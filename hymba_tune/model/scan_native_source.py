"""The C++ of the native scan: what `scan_native` compiles."""

SOURCE = r"""
// The selective scan over texts laid end to end, forward and backward.
//
// W channels stand side by side in a vector; GROUP channels are one unit of work, whatever the number of threads, and
// every sum has a fixed order: the same bits come out on any number of threads. Within a text the time is cut into
// chunks; the forward keeps the state in front of each chunk, the backward computes those within from it again.
//
// E channels, N size of a channel's state; u input, dt time step before softplus, z gate.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
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
constexpr int BLOCKS = GROUP / W;
constexpr float LOG2E = 1.44269504f, LN2 = 0.693147181f;

typedef float V __attribute__((vector_size(4 * W)));
typedef int32_t I __attribute__((vector_size(4 * W)));
typedef uint32_t U __attribute__((vector_size(4 * W)));
typedef uint16_t H __attribute__((vector_size(2 * W)));

// A matrix whose rows are contiguous; data is null where there is none.
struct Rows {
    void *data;
    int64_t stride, bf16;
};

struct Scan {
    int64_t texts, E, N, threads;
    const int64_t *offsets;
    Rows u, dt, B, C, z, y, dy, du, ddt, dB, dC, dz;
    const float *A, *D, *dt_bias, *initial;
    int64_t initial_stride;
    float *final, *kept;
    const float *d_final;
    float *dA, *dD, *ddt_bias, *d_initial, *dB_groups, *dC_groups;
};

// States that fade out become denormal, and arithmetic on those is many times slower.
struct FlushDenormals {
#if defined(__SSE2__)
    unsigned saved = _mm_getcsr();
    FlushDenormals() { _mm_setcsr(saved | 0x8040); }
    ~FlushDenormals() { _mm_setcsr(saved); }
#endif
};

template <class Work> void parallel(int64_t threads, int64_t items, Work work) {
    std::atomic<int64_t> next{0};
    auto run = [&] {
        FlushDenormals scope;
        for (int64_t item; (item = next++) < items;) work(item);
    };
    std::vector<std::thread> others;
    try {
        while ((int64_t)others.size() + 1 < std::min(threads, items)) others.emplace_back(run);
    } catch (const std::system_error &) {  // no more threads to be had: those there are do the work
    }
    run();
    for (auto &other : others) other.join();
}

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

// W rows of an (E, N) matrix to N vectors, and back; zeros beyond the last channel or where there is no matrix.
void gather(const float *rows, int64_t N, int lanes, V *out) {
    for (int64_t n = 0; n < N; n++) {
        out[n] = V{};
        for (int lane = 0; rows && lane < lanes; lane++) out[n][lane] = rows[lane * N + n];
    }
}

void scatter(const V *in, int64_t N, int lanes, float *rows) {
    for (int64_t n = 0; n < N; n++)
        for (int lane = 0; lane < lanes; lane++) rows[lane * N + n] = in[n][lane];
}

float sum(V v) {
    float total = 0;
    for (int lane = 0; lane < W; lane++) total += v[lane];
    return total;
}

// W channels of a group.
struct Block {
    int64_t column;
    int lanes;
    V D{}, dt_bias{};
    V dD{}, ddt_bias{};
    std::vector<V> A{}, state{}, dA{}, d_state{};  // A in powers of two; d_state is the gradient behind the chunk
};

// What the blocks share: a chunk's B and C, and their gradients, still a sum for each lane.
struct Group {
    const Scan &p;
    int64_t index;
    std::vector<Block> blocks;
    std::vector<float> B, C;
    std::vector<V> dB, dC;

    Group(const Scan &p, int64_t index) : p(p), index(index), B(CHUNK * p.N), C(CHUNK * p.N) {
        int64_t end = std::min((index + 1) * GROUP, p.E);
        for (int64_t column = index * GROUP; column < end; column += W) {
            Block block{column, (int)std::min<int64_t>(W, end - column)};
            if (p.D) block.D = load(p.D + column, block.lanes);
            if (p.dt_bias) block.dt_bias = load(p.dt_bias + column, block.lanes);
            block.A.resize(p.N);
            block.state.resize(p.N);
            gather(p.A + column * p.N, p.N, block.lanes, block.A.data());
            for (V &a : block.A) a *= LOG2E;
            blocks.push_back(block);
        }
    }

    void read(const Rows &x, int64_t begin, int steps, std::vector<float> &out) {
        for (int t = 0; t < steps; t++)
            for (int64_t n = 0; n < p.N; n += W) {
                int lanes = (int)std::min<int64_t>(W, p.N - n);
                V v = load(x, begin + t, n, lanes);
                copy<float>(&out[t * p.N + n], &v, lanes);
            }
    }

    void read(int64_t begin, int steps) {
        read(p.B, begin, steps, B);
        read(p.C, begin, steps, C);
    }

    float *kept(int64_t chunk, size_t block) {
        int64_t groups = (p.E + GROUP - 1) / GROUP;
        return p.kept + ((chunk * groups + index) * BLOCKS + (int64_t)block) * p.N * W;
    }
};

// R states of each channel through a chunk.
template <int R>
inline void advance(const Group &group, Block &block, int64_t n, int steps, const V *delta, const V *input, V *y) {
    V s[R], a[R];
    for (int r = 0; r < R; r++) s[r] = block.state[n + r], a[r] = block.A[n + r];
    for (int t = 0; t < steps; t++) {
        const float *B = &group.B[t * group.p.N + n], *C = &group.C[t * group.p.N + n];
        V out = y[t];
        for (int r = 0; r < R; r++) {
            s[r] = exp2(delta[t] * a[r]) * s[r] + input[t] * B[r];
            out += s[r] * C[r];
        }
        y[t] = out;
    }
    for (int r = 0; r < R; r++) block.state[n + r] = s[r];
}

void forward_chunk(const Group &group, Block &block, int64_t begin, int steps) {
    const Scan &p = group.p;
    V delta[CHUNK], input[CHUNK], y[CHUNK];
    for (int t = 0; t < steps; t++) {
        V u = load(p.u, begin + t, block.column, block.lanes);
        delta[t] = Softplus(load(p.dt, begin + t, block.column, block.lanes) + block.dt_bias).value;
        input[t] = delta[t] * u;
        y[t] = block.D * u;
    }
    int64_t n = 0;
    for (; n + 4 <= p.N; n += 4) advance<4>(group, block, n, steps, delta, input, y);
    for (; n < p.N; n++) advance<1>(group, block, n, steps, delta, input, y);
    for (int t = 0; t < steps; t++) {
        if (p.z.data) {
            V z = load(p.z, begin + t, block.column, block.lanes);
            y[t] *= z * sigmoid(z);
        }
        store(p.y, begin + t, block.column, block.lanes, y[t]);
    }
}

void forward_group(const Scan &p, int64_t index) {
    Group group(p, index);
    int64_t chunk = 0;
    for (int64_t text = 0; text < p.texts; text++) {
        for (Block &block : group.blocks) {
            const float *initial = p.initial ? p.initial + text * p.initial_stride + block.column * p.N : nullptr;
            gather(initial, p.N, block.lanes, block.state.data());
        }
        int64_t end = p.offsets[text + 1];
        for (int64_t begin = p.offsets[text]; begin < end; begin += CHUNK, chunk++) {
            int steps = (int)std::min<int64_t>(CHUNK, end - begin);
            group.read(begin, steps);
            for (size_t b = 0; b < group.blocks.size(); b++) {
                Block &block = group.blocks[b];
                if (p.kept) memcpy(group.kept(chunk, b), block.state.data(), p.N * sizeof(V));
                forward_chunk(group, block, begin, steps);
            }
        }
        for (Block &block : group.blocks)
            scatter(block.state.data(), p.N, block.lanes, p.final + (text * p.E + block.column) * p.N);
    }
}

// The chunk as the backward of one block sees it: dy is y's gradient in front of the gate, d_input that of delta * u.
struct Chunk {
    V u[CHUNK], delta[CHUNK], d_delta[CHUNK], slope[CHUNK], input[CHUNK], d_input[CHUNK];
    V y[CHUNK], dy[CHUNK], dz[CHUNK];
};

// R states of each channel through a chunk, and their gradients back.
template <int R> inline void retreat(Group &group, Block &block, int64_t n, int steps, Chunk &c) {
    const int64_t N = group.p.N;
    V states[CHUNK + 1][R], decays[CHUNK][R], a[R], ds[R], dA[R];
    for (int r = 0; r < R; r++) {
        states[0][r] = block.state[n + r];
        a[r] = block.A[n + r];
        ds[r] = block.d_state[n + r];
        dA[r] = block.dA[n + r];
    }
    for (int t = 0; t < steps; t++) {
        const float *B = &group.B[t * N + n], *C = &group.C[t * N + n];
        V out = c.y[t];
        for (int r = 0; r < R; r++) {
            decays[t][r] = exp2(c.delta[t] * a[r]);
            states[t + 1][r] = decays[t][r] * states[t][r] + c.input[t] * B[r];
            out += states[t + 1][r] * C[r];
        }
        c.y[t] = out;
    }
    for (int t = steps - 1; t >= 0; t--) {
        const float *B = &group.B[t * N + n], *C = &group.C[t * N + n];
        V *dB = &group.dB[t * N + n], *dC = &group.dC[t * N + n];
        V d_input = c.d_input[t], d_delta = c.d_delta[t];
        for (int r = 0; r < R; r++) {
            dC[r] += states[t + 1][r] * c.dy[t];
            ds[r] += c.dy[t] * C[r];
            dB[r] += ds[r] * c.input[t];
            d_input += ds[r] * B[r];
            ds[r] *= decays[t][r];
            V d_exponent = ds[r] * states[t][r];
            d_delta += d_exponent * a[r];
            dA[r] += d_exponent * c.delta[t];
        }
        c.d_input[t] = d_input, c.d_delta[t] = d_delta;
    }
    for (int r = 0; r < R; r++) block.d_state[n + r] = ds[r], block.dA[n + r] = dA[r];
}

void backward_chunk(Group &group, Block &block, int64_t begin, int steps) {
    const Scan &p = group.p;
    const int64_t column = block.column;
    const int lanes = block.lanes;
    Chunk c;
    for (int t = 0; t < steps; t++) {
        Softplus delta(load(p.dt, begin + t, column, lanes) + block.dt_bias);
        c.u[t] = load(p.u, begin + t, column, lanes);
        c.delta[t] = delta.value;
        c.slope[t] = delta.slope;
        c.input[t] = c.delta[t] * c.u[t];
        c.y[t] = block.D * c.u[t];
        c.dy[t] = load(p.dy, begin + t, column, lanes);
        if (p.z.data) {
            V z = load(p.z, begin + t, column, lanes), s = sigmoid(z);
            c.dz[t] = c.dy[t] * (s * (1.f + z * (1.f - s)));  // times y, once that is known
            c.dy[t] *= z * s;
        }
        c.d_input[t] = c.d_delta[t] = V{};
    }
    int64_t n = 0;
    for (; n + 4 <= p.N; n += 4) retreat<4>(group, block, n, steps, c);
    for (; n < p.N; n++) retreat<1>(group, block, n, steps, c);
    for (int t = 0; t < steps; t++) {
        V ddt = (c.d_delta[t] * LN2 + c.d_input[t] * c.u[t]) * c.slope[t];
        block.dD += c.dy[t] * c.u[t];
        block.ddt_bias += ddt;
        store(p.ddt, begin + t, column, lanes, ddt);
        store(p.du, begin + t, column, lanes, c.d_input[t] * c.delta[t] + c.dy[t] * block.D);
        if (p.z.data) store(p.dz, begin + t, column, lanes, c.dz[t] * c.y[t]);
    }
}

void backward_group(const Scan &p, int64_t index) {
    Group group(p, index);
    group.dB.resize(CHUNK * p.N);
    group.dC.resize(CHUNK * p.N);
    for (Block &block : group.blocks) block.dA.assign(p.N, V{}), block.d_state.resize(p.N);
    int64_t chunk = 0;
    for (int64_t text = 0; text < p.texts; text++) chunk += (p.offsets[text + 1] - p.offsets[text] + CHUNK - 1) / CHUNK;
    for (int64_t text = p.texts - 1; text >= 0; text--) {
        for (Block &block : group.blocks) {
            const float *d_final = p.d_final ? p.d_final + (text * p.E + block.column) * p.N : nullptr;
            gather(d_final, p.N, block.lanes, block.d_state.data());
        }
        int64_t start = p.offsets[text], end = p.offsets[text + 1];
        for (int64_t begin = start + (end - start - 1) / CHUNK * CHUNK; start < end && begin >= start; begin -= CHUNK) {
            int steps = (int)std::min<int64_t>(CHUNK, end - begin);
            group.read(begin, steps);
            std::fill(group.dB.begin(), group.dB.end(), V{});
            std::fill(group.dC.begin(), group.dC.end(), V{});
            chunk--;
            for (size_t b = 0; b < group.blocks.size(); b++) {
                Block &block = group.blocks[b];
                memcpy(block.state.data(), group.kept(chunk, b), p.N * sizeof(V));
                backward_chunk(group, block, begin, steps);
            }
            int64_t place = (index * p.offsets[p.texts] + begin) * p.N;
            for (int64_t i = 0; i < steps * p.N; i++) {
                p.dB_groups[place + i] = sum(group.dB[i]);
                p.dC_groups[place + i] = sum(group.dC[i]);
            }
        }
        for (Block &block : group.blocks)
            scatter(block.d_state.data(), p.N, block.lanes, p.d_initial + (text * p.E + block.column) * p.N);
    }
    for (Block &block : group.blocks) {
        scatter(block.dA.data(), p.N, block.lanes, p.dA + block.column * p.N);
        if (p.D) copy<float>(p.dD + block.column, &block.dD, block.lanes);
        if (p.dt_bias) copy<float>(p.ddt_bias + block.column, &block.ddt_bias, block.lanes);
    }
}

void sum_groups(const float *groups, int64_t count, const Scan &p, const Rows &out) {
    int64_t rows = p.offsets[p.texts];
    for (int64_t t = 0; t < rows; t++)
        for (int64_t n = 0; n < p.N; n += W) {
            int lanes = (int)std::min<int64_t>(W, p.N - n);
            V total{};
            for (int64_t group = 0; group < count; group++) total += load(groups + (group * rows + t) * p.N + n, lanes);
            store(out, t, n, lanes, total);
        }
}

}  // namespace

extern "C" void forward(const Scan *p) {
    parallel(p->threads, (p->E + GROUP - 1) / GROUP, [=](int64_t index) { forward_group(*p, index); });
}

extern "C" void backward(const Scan *p) {
    int64_t groups = (p->E + GROUP - 1) / GROUP;
    parallel(p->threads, groups, [=](int64_t index) { backward_group(*p, index); });
    sum_groups(p->dB_groups, groups, *p, p->dB);
    sum_groups(p->dC_groups, groups, *p, p->dC);
}
"""

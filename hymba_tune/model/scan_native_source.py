"""The C++ source of the native scan, which `scan_native` compiles."""

from .native_vectors import VECTORS

SOURCE = (
    VECTORS
    + r"""
// The selective scan over packed texts, forward and backward.
//
// A vector holds W adjacent channels. GROUP channels are one unit of work whatever the number of threads, and every sum
// has a fixed order, so that the result does not depend on the number of threads. Each text is divided into chunks of
// time. The forward saves the state in front of each chunk; the backward recomputes the states within it.
//
// E channels, N size of a channel's state; u input, dt time step before softplus, z gate.

namespace {

struct Scan {
    int64_t texts, E, N, threads, fuses_meta_prefix;
    // fuses_meta_prefix: the texts after the first start from its final state
    const int64_t *offsets;
    Rows u, dt, B, C, z, y, dy, du, ddt, dB, dC, dz;
    const float *A, *D, *dt_bias, *initial;
    int64_t initial_stride;
    float *final, *chunk_states;  // chunk_states, in front of each chunk, may be null in the forward
    const float *d_final;
    float *dA, *dD, *ddt_bias, *d_initial, *dB_groups, *dC_groups;
};

// Converts W rows of an (E, N) matrix to N vectors, with zeros beyond the last channel or if there is no matrix.
void gather(const float *rows, int64_t N, int lanes, V *out) {
    for (int64_t n = 0; n < N; n++) {
        out[n] = V{};
        for (int lane = 0; rows && lane < lanes; lane++) out[n][lane] = rows[lane * N + n];
    }
}

// The inverse of gather.
void scatter(const V *in, int64_t N, int lanes, float *rows) {
    for (int64_t n = 0; n < N; n++)
        for (int lane = 0; lane < lanes; lane++) rows[lane * N + n] = in[n][lane];
}

// W channels of a group.
struct Block {
    int64_t column;
    int lanes;
    V D{}, dt_bias{}, dD{}, ddt_bias{};
    // A is scaled for exp2. first is the final state of the first text, or in the backward its gradient from the other
    // texts. d_state is the gradient of the state after the current token.
    std::vector<V> A{}, state{}, first{}, dA{}, d_state{};

    V read(const Rows &x, int64_t t) const { return load(x, t, column, lanes); }
    void write(const Rows &x, int64_t t, V v) const { store(x, t, column, lanes, v); }
};

// The data that the blocks of a group share: B and C of a chunk, and their gradients, not yet summed over the lanes.
struct Group {
    const Scan &p;
    std::vector<Block> blocks;
    std::vector<float> B, C;
    std::vector<V> dBC;  // interleaved, because addresses that differ by 4096 bytes can conflict in the CPU

    Group(const Scan &p, int64_t index) : p(p), B(CHUNK * p.N), C(CHUNK * p.N), dBC(2 * CHUNK * p.N) {
        int64_t end = std::min((index + 1) * GROUP, p.E);
        for (int64_t column = index * GROUP; column < end; column += W) {
            Block block{column, (int)std::min<int64_t>(W, end - column)};
            if (p.D) block.D = load(p.D + column, block.lanes);
            if (p.dt_bias) block.dt_bias = load(p.dt_bias + column, block.lanes);
            for (auto *states : {&block.A, &block.state, &block.first, &block.dA, &block.d_state})
                states->assign(p.N, V{});
            gather(p.A + column * p.N, p.N, block.lanes, block.A.data());
            for (V &a : block.A) a *= LOG2E;
            blocks.push_back(block);
        }
    }

    void read(int64_t begin, int steps) {
        for (int t = 0; t < steps; t++)
            for (int64_t n = 0; n < p.N; n += W) {
                int lanes = (int)std::min<int64_t>(W, p.N - n);
                V b = load(p.B, begin + t, n, lanes), c = load(p.C, begin + t, n, lanes);
                copy<float>(&B[t * p.N + n], &b, lanes);
                copy<float>(&C[t * p.N + n], &c, lanes);
            }
    }
};

int64_t count_groups(const Scan &p) { return (p.E + GROUP - 1) / GROUP; }
int64_t count_chunks(const Scan &p, int64_t text) {
    return (p.offsets[text + 1] - p.offsets[text] + CHUNK - 1) / CHUNK;
}

// The state in front of a chunk.
float *chunk_state(const Scan &p, int64_t chunk, const Block &block) {
    return p.chunk_states + (chunk * count_groups(p) * GROUP + block.column) * p.N;
}

// Advances R states of each channel through a chunk, and adds their part to y.
template <int R>
inline void forward_states(const Group &group, Block &block, int64_t n, int steps, const V *delta, const V *input,
                           V *y) {
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
        V u = block.read(p.u, begin + t);
        delta[t] = Softplus(block.read(p.dt, begin + t) + block.dt_bias).value;
        input[t] = delta[t] * u;
        y[t] = block.D * u;
    }
    int64_t n = 0;
    for (; n + 4 <= p.N; n += 4) forward_states<4>(group, block, n, steps, delta, input, y);
    for (; n < p.N; n++) forward_states<1>(group, block, n, steps, delta, input, y);
    for (int t = 0; t < steps; t++) {
        if (p.z.data) {
            V z = block.read(p.z, begin + t);
            y[t] *= z * sigmoid(z);
        }
        block.write(p.y, begin + t, y[t]);
    }
}

void forward_group(const Scan &p, int64_t index) {
    Group group(p, index);
    int64_t chunk = 0;
    for (int64_t text = 0; text < p.texts; text++) {
        for (Block &block : group.blocks) {
            if (p.fuses_meta_prefix && text) {
                block.state = block.first;
                continue;
            }
            const float *initial = p.initial ? p.initial + text * p.initial_stride + block.column * p.N : nullptr;
            gather(initial, p.N, block.lanes, block.state.data());
        }
        int64_t end = p.offsets[text + 1];
        for (int64_t begin = p.offsets[text]; begin < end; begin += CHUNK, chunk++) {
            int steps = (int)std::min<int64_t>(CHUNK, end - begin);
            group.read(begin, steps);
            for (Block &block : group.blocks) {
                if (p.chunk_states) memcpy(chunk_state(p, chunk, block), block.state.data(), p.N * sizeof(V));
                forward_chunk(group, block, begin, steps);
            }
        }
        for (Block &block : group.blocks) {
            scatter(block.state.data(), p.N, block.lanes, p.final + (text * p.E + block.column) * p.N);
            if (!text) block.first = block.state;
        }
    }
}

// A chunk in the backward of one block. dy is the gradient of y before the gate, and d_input that of delta * u.
struct Chunk {
    V u[CHUNK], delta[CHUNK], d_delta[CHUNK], slope[CHUNK], input[CHUNK], d_input[CHUNK];
    V y[CHUNK], dy[CHUNK], dz[CHUNK];
};

// Advances R states of each channel through a chunk, and their gradients from its end to its start.
template <int R> inline void backward_states(Group &group, Block &block, int64_t n, int steps, Chunk &c) {
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
        V *dBC = &group.dBC[2 * (t * N + n)];
        V d_input = c.d_input[t], d_delta = c.d_delta[t];
        for (int r = 0; r < R; r++) {
            dBC[2 * r + 1] += states[t + 1][r] * c.dy[t];
            ds[r] += c.dy[t] * C[r];
            dBC[2 * r] += ds[r] * c.input[t];
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
    Chunk c;
    for (int t = 0; t < steps; t++) {
        Softplus delta(block.read(p.dt, begin + t) + block.dt_bias);
        c.u[t] = block.read(p.u, begin + t);
        c.delta[t] = delta.value;
        c.slope[t] = delta.slope;
        c.input[t] = c.delta[t] * c.u[t];
        c.y[t] = block.D * c.u[t];
        c.dy[t] = block.read(p.dy, begin + t);
        if (p.z.data) {
            V z = block.read(p.z, begin + t), s = sigmoid(z);
            c.dz[t] = c.dy[t] * (s * (1.f + z * (1.f - s)));  // to be multiplied by y below
            c.dy[t] *= z * s;
        }
        c.d_input[t] = c.d_delta[t] = V{};
    }
    int64_t n = 0;
    for (; n + 4 <= p.N; n += 4) backward_states<4>(group, block, n, steps, c);
    for (; n < p.N; n++) backward_states<1>(group, block, n, steps, c);
    for (int t = 0; t < steps; t++) {
        V ddt = (c.d_delta[t] * LN2 + c.d_input[t] * c.u[t]) * c.slope[t];
        block.dD += c.dy[t] * c.u[t];
        block.ddt_bias += ddt;
        block.write(p.ddt, begin + t, ddt);
        block.write(p.du, begin + t, c.d_input[t] * c.delta[t] + c.dy[t] * block.D);
        if (p.z.data) block.write(p.dz, begin + t, c.dz[t] * c.y[t]);
    }
}

void backward_group(const Scan &p, int64_t index) {
    Group group(p, index);
    int64_t chunk = 0;
    for (int64_t text = 0; text < p.texts; text++) chunk += count_chunks(p, text);
    for (int64_t text = p.texts - 1; text >= 0; text--) {
        for (Block &block : group.blocks) {
            const float *d_final = p.d_final ? p.d_final + (text * p.E + block.column) * p.N : nullptr;
            gather(d_final, p.N, block.lanes, block.d_state.data());
            for (int64_t n = 0; p.fuses_meta_prefix && !text && n < p.N; n++) block.d_state[n] += block.first[n];
        }
        for (int64_t index_in_text = count_chunks(p, text) - 1; index_in_text >= 0; index_in_text--) {
            int64_t begin = p.offsets[text] + index_in_text * CHUNK;
            int steps = (int)std::min<int64_t>(CHUNK, p.offsets[text + 1] - begin);
            group.read(begin, steps);
            std::fill(group.dBC.begin(), group.dBC.end(), V{});
            chunk--;
            for (Block &block : group.blocks) {
                memcpy(block.state.data(), chunk_state(p, chunk, block), p.N * sizeof(V));
                backward_chunk(group, block, begin, steps);
            }
            int64_t offset = (index * p.offsets[p.texts] + begin) * p.N;
            for (int64_t i = 0; i < steps * p.N; i++) {
                p.dB_groups[offset + i] = sum(group.dBC[2 * i]);
                p.dC_groups[offset + i] = sum(group.dBC[2 * i + 1]);
            }
        }
        for (Block &block : group.blocks) {
            scatter(block.d_state.data(), p.N, block.lanes, p.d_initial + (text * p.E + block.column) * p.N);
            for (int64_t n = 0; p.fuses_meta_prefix && text && n < p.N; n++) block.first[n] += block.d_state[n];
        }
    }
    for (Block &block : group.blocks) {
        scatter(block.dA.data(), p.N, block.lanes, p.dA + block.column * p.N);
        if (p.D) copy<float>(p.dD + block.column, &block.dD, block.lanes);
        if (p.dt_bias) copy<float>(p.ddt_bias + block.column, &block.ddt_bias, block.lanes);
    }
}

void sum_groups(const Scan &p, const float *groups, const Rows &out) {
    int64_t rows = p.offsets[p.texts];
    for (int64_t t = 0; t < rows; t++)
        for (int64_t n = 0; n < p.N; n += W) {
            int lanes = (int)std::min<int64_t>(W, p.N - n);
            V total{};
            for (int64_t g = 0; g < count_groups(p); g++) total += load(groups + (g * rows + t) * p.N + n, lanes);
            store(out, t, n, lanes, total);
        }
}

}  // namespace

extern "C" void forward(const Scan *p) {
    parallel(p->threads, count_groups(*p), [=](int64_t index) { forward_group(*p, index); });
}

extern "C" void backward(const Scan *p) {
    parallel(p->threads, count_groups(*p), [=](int64_t index) { backward_group(*p, index); });
    sum_groups(*p, p->dB_groups, p->dB);
    sum_groups(*p, p->dC_groups, p->dC);
}
"""
)

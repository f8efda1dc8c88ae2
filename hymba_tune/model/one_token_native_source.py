"""The C++ source of the operations of one new token of each text, which `one_token_native` compiles."""

from .native_vectors import VECTORS

SOURCE = (
    VECTORS
    + r"""
// What a layer computes between its matrix products where every text of a cache has one new token.
//
// Work is divided into items whatever the number of threads, and every sum has a fixed order, so that the result does
// not depend on the number of threads.
//
// Groups of R heads share keys and values; a width of a query or key head, v width of a value head, E channels, K width
// of the convolution, N size of a channel's state, C columns of a buffer of keys or values.

namespace {

struct Prepare {
    int64_t texts, heads, groups, width, value_width, columns, E, K, threads;
    float eps;
    Rows projected;               // (texts, queries + keys + values + x + gate)
    Rows q_norm, k_norm;          // (heads, a) and (groups, a), or null
    Rows cos, sin;                // (texts, a), or null
    Grid key, value;              // (texts * groups, C, a or v)
    const int64_t *lengths;       // (texts), the number of tokens before the new one
    Rows taps, bias;              // (E, K); (1, E) or null
    Grid tails;                   // (texts, K - 1, E)
    Rows query, x;                // (texts * heads, a), (texts, E)
};

struct Attend {
    int64_t texts, heads, groups, width, value_width, columns, meta, window, threads;
    Rows query;                   // (texts * heads, a)
    Grid meta_key, meta_value;    // (meta, groups, a or v)
    Grid key, value;              // (texts * groups, C, a or v)
    const int64_t *lengths;
    Rows output;                  // (texts * heads, v)
};

struct Update {
    int64_t texts, E, rank, N, threads;
    float eps;
    Rows x, parameters, gate;           // (texts, E), (texts, rank + 2 N), (texts, E)
    Rows dt_norm, B_norm, C_norm;       // (1, rank or N), or null
    Rows dt_weight, dt_bias, A_log, D;  // (E, rank), (1, E) or null, (E, N), (1, E)
    Grid state;                         // (texts, E, N)
    Rows y;                             // (texts, E)
};

// Memory for vectors and remainders of them.
int64_t padded(int64_t width) { return (width + W - 1) / W * W; }

// Copies a row in float32, normalized if the norm has a weight.
void norm(const Rows &x, int64_t row, int64_t first, int64_t width, const Rows &weight, int64_t weight_row, float eps,
          float *to) {
    V squares{};
    each_vector(width, [&](int64_t column, int lanes) {
        V v = load(x, row, first + column, lanes);
        store(to + column, W, v);
        squares += v * v;
    });
    if (!weight.data) return;
    float scale = 1.f / std::sqrt(sum(squares) / width + eps);
    each_vector(width, [&](int64_t column, int lanes) {
        V normed = rounded(load(to + column, W) * scale, x.bf16) * load(weight, weight_row, column, lanes);
        store(to + column, W, rounded(normed, x.bf16 && weight.bf16));
    });
}

// Writes a query or key: normalized, and rotated at the position of its text.
void write_head(const Prepare &p, int64_t text, int64_t first, const Rows &weight, int64_t head, const Rows &to,
                int64_t to_row, std::vector<float> &scratch) {
    float *x = scratch.data();
    norm(p.projected, text, first, p.width, weight, head, p.eps, x);
    if (!p.cos.data)
        return each_vector(p.width, [&](int64_t c, int lanes) { store(to, to_row, c, lanes, load(x + c, lanes)); });
    int64_t half = p.width / 2;
    each_vector(half, [&](int64_t c, int lanes) {
        V low = load(x + c, lanes), high = load(x + half + c, lanes);
        store(to, to_row, c, lanes, low * load(p.cos, text, c, lanes) - high * load(p.sin, text, c, lanes));
        store(to, to_row, half + c, lanes,
              high * load(p.cos, text, half + c, lanes) + low * load(p.sin, text, half + c, lanes));
    });
}

void prepare_heads(const Prepare &p, int64_t text) {
    std::vector<float> scratch(padded(p.width));
    for (int64_t h = 0; h < p.heads; h++)
        write_head(p, text, h * p.width, p.q_norm, h, p.query, text * p.heads + h, scratch);
    if (!p.key.data) return;
    int64_t keys = p.heads * p.width, values = keys + p.groups * p.width, column = p.lengths[text] % p.columns;
    for (int64_t g = 0; g < p.groups; g++) {
        write_head(p, text, keys + g * p.width, p.k_norm, g, p.key.at(text * p.groups + g, column), 0, scratch);
        Rows value = p.value.at(text * p.groups + g, column);
        each_vector(p.value_width, [&](int64_t c, int lanes) {
            store(value, 0, c, lanes, load(p.projected, text, values + g * p.value_width + c, lanes));
        });
    }
}

// Convolves some channels, moves their tails on, and applies silu.
void convolve(const Prepare &p, int64_t text, int64_t begin, int64_t end) {
    int64_t first = p.heads * p.width + (p.key.data ? p.groups * (p.width + p.value_width) : 0);
    for (int64_t column = begin; column < end; column += W) {
        int lanes = (int)std::min<int64_t>(W, end - column);
        V y = load(p.bias, 0, column, lanes), next;
        for (int64_t k = 0; k < p.K; k++) {
            V taps{};
            for (int lane = 0; lane < lanes; lane++) taps[lane] = load(p.taps, column + lane, k, 1)[0];
            if (k + 1 < p.K) next = load(p.tails.at(text, k), 0, column, lanes);
            else next = load(p.projected, text, first + column, lanes);
            if (k) store(p.tails.at(text, k - 1), 0, column, lanes, next);
            y += next * taps;
        }
        y = rounded(y, p.x.bf16);
        store(p.x, text, column, lanes, y * sigmoid(y));
    }
}

constexpr int64_t KEYS = 512;  // the number of keys of a unit of work
constexpr int64_t GROUP = 64;  // the number of channels of a unit of work
constexpr int MOST = 8;        // the largest number of heads that read a key together

// Some keys of a group, in adjacent rows, with their values.
struct Run {
    Rows key, value;
    int64_t count;
};

// The keys that the new token of a text sees: the meta tokens, and one run of positions, which may wrap around the
// buffer.
struct Seen {
    Run runs[3];
    int64_t count = 0;

    Seen(const Attend &p, int64_t text, int64_t group) {
        int64_t last = p.lengths[text], first = p.window < 0 ? 0 : std::max<int64_t>(0, last - p.window);
        first = std::max(first, last + 1 - p.columns);
        int64_t start = first % p.columns, keys = last + 1 - first, straight = std::min(keys, p.columns - start);
        runs[0] = run(p.meta_key, p.meta_value, 0, group, p.meta_key.row, p.meta_value.row, p.meta);
        int64_t row = text * p.groups + group;
        runs[1] = run(p.key, p.value, row, start, p.key.head, p.value.head, straight);
        runs[2] = run(p.key, p.value, row, 0, p.key.head, p.value.head, keys - straight);
        for (const Run &each : runs) count += each.count;
    }
    static Run run(const Grid &key, const Grid &value, int64_t row, int64_t head, int64_t key_stride,
                   int64_t value_stride, int64_t count) {
        if (!count) return {};
        Rows keys = key.at(row, head), values = value.at(row, head);
        keys.stride = key_stride, values.stride = value_stride;
        return {keys, values, count};
    }
    // Calls `work` with the parts of the runs in a range of keys, and the place of each run in the range.
    template <class Work> void each(int64_t begin, int64_t end, Work work) const {
        int64_t before = 0;
        for (const Run &run : runs) {
            int64_t from = std::max<int64_t>(begin - before, 0), to = std::min(end - before, run.count);
            if (from < to) work(run, from, to, before - begin);
            before += run.count;
        }
    }
};

// The result of a head over one unit of keys: the weighted values, then the largest score and the sum of the weights.
struct Parts {
    int64_t units, value_width;
    std::unique_ptr<float[]> memory;

    Parts(const Attend &p, int64_t units)
        : units(units), value_width(padded(p.value_width)),
          memory(new float[p.texts * p.heads * units * (value_width + 2)]) {}
    float *at(int64_t row, int64_t unit) const { return memory.get() + (row * units + unit) * (value_width + 2); }
    float *statistics(int64_t row, int64_t unit) const { return at(row, unit) + value_width; }
};

// The sums of W vectors, in the lanes of one.
inline V sums(const V *x) {
#if defined(__AVX512F__)
    __m512 pairs[8], fours[4], eights[2];
    for (int i = 0; i < 8; i++)
        pairs[i] = _mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]) + _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]);
    for (int i = 0; i < 4; i++) {
        __m512d one = _mm512_castps_pd(pairs[2 * i]), other = _mm512_castps_pd(pairs[2 * i + 1]);
        fours[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(one, other)) + _mm512_castpd_ps(_mm512_unpackhi_pd(one, other));
    }
    for (int i = 0; i < 2; i++)
        eights[i] = _mm512_shuffle_f32x4(fours[2 * i], fours[2 * i + 1], 0x88) +
                    _mm512_shuffle_f32x4(fours[2 * i], fours[2 * i + 1], 0xdd);
    return _mm512_shuffle_f32x4(eights[0], eights[1], 0x88) + _mm512_shuffle_f32x4(eights[0], eights[1], 0xdd);
#else
    V all{};
    for (int i = 0; i < W; i++) all[i] = sum(x[i]);
    return all;
#endif
}

// The scores of R heads for adjacent keys. W keys at a time are converted, multiplied and summed.
template <int R, class Element>
void multiply_keys(const Element *keys, int64_t stride, int64_t count, int64_t width, const float *query,
                   float *scores) {
    int64_t vectors = padded(width) / W;
    std::vector<V> wide(W * vectors, V{});
    for (int64_t first = 0; first < count; first += W) {
        int lanes = (int)std::min<int64_t>(W, count - first);
        for (int i = 0; i < lanes; i++)
            each_vector(width, [&](int64_t c, int columns) {
                wide[i * vectors + c / W] = load(keys + (first + i) * stride + c, columns);
            });
        for (int r = 0; r < R; r++) {
            V products[W]{};
            for (int64_t c = 0; c < vectors; c++) {
                V q = load(query + (r * vectors + c) * W, W);
                for (int i = 0; i < W; i++) products[i] += q * wide[i * vectors + c];
            }
            store(scores + r * KEYS + first, lanes, sums(products));
        }
    }
}

// Adds some columns of adjacent values, weighted for R heads.
template <int R, class Element>
inline void add_values(const Element *values, int64_t stride, int64_t count, int lanes, const float *weights, V *sums) {
    V out[R];
    for (int r = 0; r < R; r++) out[r] = sums[r];
    for (int64_t key = 0; key < count; key++) {
        V v = load(values + key * stride, lanes);
        for (int r = 0; r < R; r++) out[r] += v * weights[r * KEYS + key];
    }
    for (int r = 0; r < R; r++) sums[r] = out[r];
}

// Calls `work` with a pointer to an element of a matrix, in its own format.
template <class Work> inline void with_elements(const Rows &x, int64_t row, int64_t column, Work work) {
    int64_t offset = row * x.stride + column;
    if (x.bf16) work((const uint16_t *)x.data + offset);
    else work((const float *)x.data + offset);
}

template <int R> void attend_unit(const Attend &p, const Seen &seen, int64_t row, int64_t unit, const Parts &parts) {
    int64_t begin = unit * KEYS, end = std::min(begin + KEYS, seen.count), width = padded(p.width);
    std::vector<float> memory(R * width + R * KEYS);
    float *query = memory.data(), *scores = query + R * width, scale = 1.f / std::sqrt((float)p.width);
    for (int r = 0; r < R; r++)
        each_vector(p.width, [&](int64_t c, int lanes) {
            store(query + r * width + c, W, load(p.query, row + r, c, lanes) * scale);
        });
    seen.each(begin, end, [&](const Run &run, int64_t from, int64_t to, int64_t place) {
        with_elements(run.key, from, 0, [&](auto *keys) {
            multiply_keys<R>(keys, run.key.stride, to - from, p.width, query, scores + place + from);
        });
    });
    for (int r = 0; r < R; r++) {
        V top = splat(-INFINITY), total{};
        float *own = scores + r * KEYS;
        each_vector(end - begin, [&](int64_t c, int lanes) {
            V v = first_lanes(load(own + c, lanes), lanes, -INFINITY);
            top = v > top ? v : top;
        });
        float high = highest(top);
        each_vector(end - begin, [&](int64_t c, int lanes) {
            V weights = exp(load(own + c, lanes) - high);
            store(own + c, lanes, weights);
            total += first_lanes(weights, lanes, 0);
        });
        float *statistics = parts.statistics(row + r, unit);
        statistics[0] = high, statistics[1] = sum(total);
    }
    for (int64_t c = 0; c < p.value_width; c += W) {
        int lanes = (int)std::min<int64_t>(W, p.value_width - c);
        V out[R]{};
        seen.each(begin, end, [&](const Run &run, int64_t from, int64_t to, int64_t place) {
            with_elements(run.value, from, c, [&](auto *values) {
                const float *weights = scores + place + from;
                if (lanes == W) add_values<R>(values, run.value.stride, to - from, W, weights, out);
                else add_values<R>(values, run.value.stride, to - from, lanes, weights, out);
            });
        });
        for (int r = 0; r < R; r++) store(parts.at(row + r, unit) + c, W, out[r]);
    }
}

typedef void AttendUnit(const Attend &, const Seen &, int64_t, int64_t, const Parts &);
AttendUnit *const attend_units[MOST] = {attend_unit<1>, attend_unit<2>, attend_unit<3>, attend_unit<4>,
                                        attend_unit<5>, attend_unit<6>, attend_unit<7>, attend_unit<8>};

// Joins the units of a head.
void join(const Attend &p, int64_t row, int64_t units, const Parts &parts) {
    float high = -INFINITY, total = 0;
    for (int64_t unit = 0; unit < units; unit++) high = std::max(high, parts.statistics(row, unit)[0]);
    std::vector<float> factors(units);
    for (int64_t unit = 0; unit < units; unit++) {
        factors[unit] = std::exp(parts.statistics(row, unit)[0] - high);
        total += factors[unit] * parts.statistics(row, unit)[1];
    }
    each_vector(p.value_width, [&](int64_t c, int lanes) {
        V out{};
        for (int64_t unit = 0; unit < units; unit++) out += load(parts.at(row, unit) + c, W) * factors[unit];
        store(p.output, row, c, lanes, out * (1.f / total));
    });
}

// The normalized time steps, B and C of a text, in float32.
struct Small {
    std::vector<float> memory;
    int64_t rank;
    float *dt, *B, *C;

    Small(const Update &p, int64_t text) : memory(padded(p.rank) + 2 * padded(p.N)), rank(p.rank) {
        dt = memory.data(), B = dt + padded(p.rank), C = B + padded(p.N);
        norm(p.parameters, text, 0, p.rank, p.dt_norm, 0, p.eps, dt);
        norm(p.parameters, text, p.rank, p.N, p.B_norm, 0, p.eps, B);
        norm(p.parameters, text, p.rank + p.N, p.N, p.C_norm, 0, p.eps, C);
    }
};

void update_group(const Update &p, const std::vector<Small> &small, int64_t begin, int64_t end) {
    std::vector<float> rates(padded(p.N));
    std::vector<float> steps(p.texts * GROUP), outputs(p.texts * GROUP);
    for (int64_t e = begin; e < end; e++)
        for (int64_t text = 0; text < p.texts; text++) {
            V product{};
            each_vector(p.rank, [&](int64_t c, int lanes) {
                product += load(p.dt_weight, e, c, lanes) * load(small[text].dt + c, lanes);
            });
            steps[text * GROUP + e - begin] = sum(product);
        }
    for (int64_t text = 0; text < p.texts; text++)
        each_vector(end - begin, [&](int64_t c, int lanes) {
            float *step = &steps[text * GROUP + c];
            store(step, lanes, Softplus(load(step, lanes) + load(p.dt_bias, 0, begin + c, lanes)).value);
        });
    for (int64_t e = begin; e < end; e++) {
        each_vector(p.N, [&](int64_t n, int lanes) { store(&rates[n], W, -exp(load(p.A_log, e, n, lanes)) * LOG2E); });
        for (int64_t text = 0; text < p.texts; text++) {
            float step = steps[text * GROUP + e - begin], *state = (float *)p.state.at(text, e).data;
            float input = step * load(p.x, text, e, 1)[0];
            V out{};
            each_vector(p.N, [&](int64_t n, int lanes) {
                V s = exp2(load(&rates[n], W) * step) * load(state + n, lanes) + load(small[text].B + n, lanes) * input;
                store(state + n, lanes, s);
                out += s * load(small[text].C + n, lanes);
            });
            outputs[text * GROUP + e - begin] = sum(out);
        }
    }
    for (int64_t text = 0; text < p.texts; text++)
        each_vector(end - begin, [&](int64_t c, int lanes) {
            V y = load(&outputs[text * GROUP + c], lanes), z = load(p.gate, text, begin + c, lanes);
            y += load(p.x, text, begin + c, lanes) * load(p.D, 0, begin + c, lanes);
            store(p.y, text, begin + c, lanes, y * z * sigmoid(z));
        });
}

}  // namespace

extern "C" void prepare(const Prepare *p) {
    int64_t groups = (p->E + GROUP - 1) / GROUP;
    parallel(p->threads, p->texts * (groups + 1), [=](int64_t item) {
        int64_t text = item / (groups + 1), group = item % (groups + 1);
        if (group == groups) prepare_heads(*p, text);
        else convolve(*p, text, group * GROUP, std::min((group + 1) * GROUP, p->E));
    });
}

extern "C" void attend(const Attend *p) {
    int64_t repeats = p->heads / p->groups, blocks = (repeats + MOST - 1) / MOST, units = 0;
    for (int64_t text = 0; text < p->texts; text++)
        units = std::max(units, (Seen(*p, text, 0).count + KEYS - 1) / KEYS);
    Parts parts(*p, units);
    parallel(p->threads, p->texts * p->groups * blocks * units, [&](int64_t item) {
        int64_t unit = item % units, block = item / units % blocks, group = item / units / blocks % p->groups;
        int64_t text = item / units / blocks / p->groups, first = block * MOST;
        Seen seen(*p, text, group);
        if (unit * KEYS >= seen.count) return;
        attend_units[std::min<int64_t>(MOST, repeats - first) - 1](
            *p, seen, text * p->heads + group * repeats + first, unit, parts);
    });
    for (int64_t text = 0; text < p->texts; text++) {
        int64_t own = (Seen(*p, text, 0).count + KEYS - 1) / KEYS;
        for (int64_t head = 0; head < p->heads; head++) join(*p, text * p->heads + head, own, parts);
    }
}

extern "C" void update(const Update *p) {
    std::vector<Small> small;
    for (int64_t text = 0; text < p->texts; text++) small.emplace_back(*p, text);
    parallel(p->threads, (p->E + GROUP - 1) / GROUP, [&](int64_t group) {
        update_group(*p, small, group * GROUP, std::min((group + 1) * GROUP, p->E));
    });
}
"""
)

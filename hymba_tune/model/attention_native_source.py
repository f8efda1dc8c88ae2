"""The C++ source of native attention, which `attention_native` compiles."""

from .native_vectors import VECTORS

SOURCE = (
    VECTORS
    + r"""
// Attention over packed texts that follow the meta tokens, for BLOCK queries of a group of heads at a time. A query
// sees the meta tokens and one run of keys of its own text. The queries of a block together see a longer run, so their
// scores are two matrix products, which MKL computes. A row of scores needs no mask, only the bounds of its run.
//
// Groups of R heads share keys and values; a width of a query or key head, v width of a value head.

namespace {

// MKL's product of column-major matrices, of float32 or of bfloat16 with a float32 result.
typedef void Gemm(const char *, const char *, const int *, const int *, const int *, const float *, const void *,
                  const int *, const void *, const int *, const float *, float *, const int *);

struct Attention {
    int64_t heads, groups, width, value_width, meta, text, threads;
    const int64_t *first_seen;  // (text), the first text token that each text token sees
    Grid q, k, v, y, dy, dq;
    float *lse;                 // (meta + text, heads)
    float *dk, *dv;             // (meta + text, groups, a or v), zeroed by the caller
    Gemm *gemm;
};

// Uninitialized memory, which is written before it is read.
template <class Element> struct Scratch {
    std::unique_ptr<Element[]> memory;
    explicit Scratch(int64_t count) : memory(count ? new Element[count] : nullptr) {}
    Element *data() const { return memory.get(); }
};
typedef Scratch<float> Floats;
typedef Scratch<uint16_t> Halves;

// A row-major matrix: its first element, and the distance from one row to the next.
struct Matrix {
    void *data;
    int64_t stride, bf16;

    Matrix(void *data, int64_t stride, int64_t bf16) : data(data), stride(stride), bf16(bf16) {}
    Matrix(const Grid &x, int64_t row, int64_t head) : Matrix(x.at(row, head).data, x.row, x.bf16) {}
    Matrix(const Floats &x, int64_t width) : Matrix(x.data(), width, 0) {}

    Matrix at(int64_t row, int64_t column) const {
        int64_t offset = row * stride + column;
        return {bf16 ? (void *)((uint16_t *)data + offset) : (void *)((float *)data + offset), stride, bf16};
    }
    Rows rows() const { return {data, stride, bf16}; }
};

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
// Products of bfloat16 matrices. MKL's are no faster than those of float32 for matrices as small as these.
//
// An instruction adds the products of two adjacent numbers, so the second factor is packed in pairs of its rows.
constexpr int TALL = 8, WIDE = 2;  // the rows, and vectors of columns, of the result that are summed in registers
typedef Scratch<__m512i> Pairs;

// Rows `row` and `row + 1` of some adjacent columns, in pairs; a row after the last is zero.
inline __m512i pair_rows(const uint16_t *x, int64_t stride, int64_t row, int64_t rows, int lanes) {
    __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(lanes), x + row * stride));
    if (row + 1 == rows) return low;
    __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(lanes), x + (row + 1) * stride));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// The same of a transposed matrix: columns `column` and `column + 1` of some adjacent rows.
inline __m512i pair_columns(const uint16_t *x, int64_t stride, int64_t column, int64_t columns, int lanes) {
    alignas(64) uint32_t pairs[W] = {};
    for (int lane = 0; lane < lanes; lane++)
        memcpy(pairs + lane, x + lane * stride + column, column + 1 < columns ? 4 : 2);
    return _mm512_load_si512(pairs);
}

// The first factor: number k of row m is at data[m * row + k / 2 * pair + k % 2].
struct Factor {
    const uint16_t *data;
    int64_t row, pair;
};

template <int R> void multiply_tile(const Factor &a, const __m512i *b, int64_t k, float alpha, bool add, float *c,
                                    int64_t stride, int64_t columns) {
    V sums[R][WIDE]{};
    auto step = [&](int64_t pair, size_t bytes) INLINE {
        unrolled<R>([&](int r) INLINE {
            uint32_t own = 0;
            memcpy(&own, a.data + r * a.row + pair * a.pair, bytes);
            __m512bh wide = (__m512bh)_mm512_set1_epi32((int)own);
            unrolled<WIDE>([&](int w) INLINE {
                sums[r][w] = _mm512_dpbf16_ps(sums[r][w], wide, (__m512bh)_mm512_loadu_si512(b + pair * WIDE + w));
            });
        });
    };
    for (int64_t pair = 0; pair < k / 2; pair++) step(pair, 4);
    if (k % 2) step(k / 2, 2);
    unrolled<R>([&](int r) INLINE {
        unrolled<WIDE>([&](int w) INLINE {
            int lanes = (int)std::min<int64_t>(W, columns - w * W);
            if (lanes <= 0) return;
            float *to = c + r * stride + w * W;
            V product = sums[r][w] * alpha;
            store(to, lanes, add ? product + load(to, lanes) : product);
        });
    });
}

void multiply(bool transposed_a, bool transposed_b, int64_t m, int64_t n, int64_t k, float alpha, const Matrix &a,
              const Matrix &b, bool add, const Matrix &c) {
    int64_t pairs = (k + 1) / 2, groups = (m + W - 1) / W;
    const uint16_t *a_data = (const uint16_t *)a.data, *b_data = (const uint16_t *)b.data;
    Pairs packed_a(transposed_a ? groups * pairs : 0), packed_b(pairs * WIDE);
    if (transposed_a)
        for (int64_t group = 0; group < groups; group++)
            for (int64_t pair = 0; pair < pairs; pair++)
                packed_a.data()[group * pairs + pair] = pair_rows(a_data + group * W, a.stride, 2 * pair, k,
                                                                  (int)std::min<int64_t>(W, m - group * W));
    for (int64_t column = 0; column < n; column += WIDE * W) {
        for (int64_t pair = 0; pair < pairs; pair++)
            for (int w = 0; w < WIDE; w++) {
                int64_t at = column + w * W;
                int lanes = (int)std::max<int64_t>(0, std::min<int64_t>(W, n - at));
                __m512i &packed = packed_b.data()[pair * WIDE + w];
                if (!lanes) packed = __m512i{};
                else if (transposed_b) packed = pair_columns(b_data + at * b.stride, b.stride, 2 * pair, k, lanes);
                else packed = pair_rows(b_data + at, b.stride, 2 * pair, k, lanes);
            }
        for (int64_t row = 0; row < m;) {
            Factor own{a_data + row * a.stride, a.stride, 2};
            if (transposed_a)
                own = {(const uint16_t *)(packed_a.data() + row / W * pairs) + 2 * (row % W), 2, 2 * W};
            float *to = (float *)c.data + row * c.stride + column;
            auto run = [&](auto tile) { tile(own, packed_b.data(), k, alpha, add, to, c.stride, n - column); };
            if (row + TALL <= m) run(multiply_tile<TALL>), row += TALL;
            else run(multiply_tile<1>), row++;
        }
    }
}
#endif

struct Product {
    Gemm *gemm;

    void operator()(const char *a_layout, const char *b_layout, int64_t m, int64_t n, int64_t k, float alpha,
                    const Matrix &a, const Matrix &b, float beta, const Matrix &c) const {
        if (!m || !n) return;
#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
        if (a.bf16) return multiply(*a_layout == 'T', *b_layout == 'T', m, n, k, alpha, a, b, beta != 0, c);
#endif
        int M = (int)m, N = (int)n, K = (int)k, lda = (int)a.stride, ldb = (int)b.stride, ldc = (int)c.stride;
        // A row-major matrix is a transposed column-major one, so the factors are swapped.
        gemm(b_layout, a_layout, &N, &M, &K, &alpha, b.data, &ldb, a.data, &lda, &beta, (float *)c.data, &ldc);
    }
    // c (m, n) = alpha a (m, k) b (n, k)^T, and likewise below; with a beta of 1 the product is added to c.
    void abT(int64_t m, int64_t n, int64_t k, float alpha, Matrix a, Matrix b, float beta, Matrix c) const {
        (*this)("N", "T", m, n, k, alpha, a, b, beta, c);
    }
    void ab(int64_t m, int64_t n, int64_t k, float alpha, Matrix a, Matrix b, float beta, Matrix c) const {
        (*this)("N", "N", m, n, k, alpha, a, b, beta, c);
    }
    void aTb(int64_t m, int64_t n, int64_t k, float alpha, Matrix a, Matrix b, float beta, Matrix c) const {
        (*this)("T", "N", m, n, k, alpha, a, b, beta, c);
    }
};

// Some queries, either all meta tokens or all text tokens, and the keys that any of them sees.
struct Block {
    int64_t row, queries;         // the first packed row of the block, and its number of queries
    int64_t begin, first, keys;   // the first query and key, counted among meta or text tokens; the number of keys
    int64_t meta, columns;        // the number of meta keys in front of these keys; the number of both together
    const int64_t *first_seen;    // the first key that each query sees, or null for meta tokens

    Block(const Attention &p, int64_t index) {
        int64_t meta_blocks = (p.meta + BLOCK - 1) / BLOCK;
        bool is_meta = index < meta_blocks;
        begin = (is_meta ? index : index - meta_blocks) * BLOCK;
        queries = std::min<int64_t>(BLOCK, (is_meta ? p.meta : p.text) - begin);
        row = begin + (is_meta ? 0 : p.meta);
        first_seen = is_meta ? nullptr : p.first_seen + begin;
        first = first_seen ? first_seen[0] : 0;
        keys = begin + queries - first;
        meta = is_meta ? 0 : p.meta;
        columns = meta + keys;
    }
    static int64_t count(const Attention &p) { return (p.meta + BLOCK - 1) / BLOCK + (p.text + BLOCK - 1) / BLOCK; }

    int64_t key_row() const { return first + meta; }
    int64_t low(int64_t query) const { return meta + (first_seen ? first_seen[query] - first : 0); }
    int64_t high(int64_t query) const { return meta + begin + query - first + 1; }

    // Calls `work` for the columns that a query sees.
    template <class Work> void each_seen(int64_t query, Work work) const {
        each_vector(meta, work);
        int64_t start = low(query);
        each_vector(high(query) - start, [&](int64_t column, int lanes) { work(start + column, lanes); });
    }
    void clear_unseen(const Matrix &x, int64_t row, int64_t query) const {
        auto clear = [&](int64_t start, int64_t end) {
            each_vector(end - start, [&](int64_t c, int lanes) { store(x.rows(), row, start + c, lanes, V{}); });
        };
        clear(meta, low(query));
        clear(high(query), columns);
    }
};

// The buffers of one block of one group. The rows are those of its R heads, one head after the other.
struct Workspace {
    const Attention &p;
    const Block block;
    int64_t group, repeats, rows, bf16;
    float scale;
    Product product;
    Floats query, scores, d_weights, d_output;  // query and d_output are in the dtype of the model
    Halves narrow_weights, narrow_scores;

    Workspace(const Attention &p, const Block &block, int64_t group, bool backward)
        : p(p), block(block), group(group), repeats(p.heads / p.groups), rows(repeats * block.queries), bf16(p.q.bf16),
          scale(1.f / std::sqrt((float)p.width)), product{p.gemm}, query(rows * p.width), scores(rows * block.columns),
          d_weights(backward * rows * block.columns), d_output(backward * rows * p.value_width),
          narrow_weights(bf16 * rows * block.columns), narrow_scores(backward * bf16 * rows * block.columns) {
        gather(p.q, p.width, query);
        if (backward) gather(p.dy, p.value_width, d_output);
    }

    int64_t head(int64_t row) const { return group * repeats + row / block.queries; }
    int64_t packed_row(int64_t row) const { return block.row + row % block.queries; }

    void gather(const Grid &x, int64_t width, const Floats &to) const {
        for (int64_t row = 0; row < rows; row++) {
            size_t bytes = width * (bf16 ? 2 : 4);
            memcpy((char *)to.data() + row * bytes, x.at(packed_row(row), head(row)).data, bytes);
        }
    }
    Matrix gathered(const Floats &x, int64_t width) const { return {x.data(), width, bf16}; }
    // A factor of a matrix product, in the dtype of the model.
    Matrix narrow(const Floats &wide, const Halves &rounded) const {
        return bf16 ? Matrix(rounded.data(), block.columns, 1) : Matrix(wide, block.columns);
    }
    Matrix weights() const { return narrow(scores, narrow_weights); }
    Matrix d_scores() const { return narrow(d_weights, narrow_scores); }

    // Multiplies rows by the keys or values of both runs; each run has its own columns of the result.
    void multiply_runs(int64_t from, int64_t count, Matrix x, const Grid &keys, int64_t width, float alpha,
                       Matrix out) {
        product.abT(count, block.meta, width, alpha, x.at(from, 0), {keys, 0, group}, 0, out.at(from, 0));
        product.abT(count, block.keys, width, alpha, x.at(from, 0), {keys, block.key_row(), group}, 0,
                    out.at(from, block.meta));
    }
    // Multiplies the weights of both runs by their keys or values, and adds the two products.
    void sum_runs(int64_t from, int64_t count, Matrix w, const Grid &values, int64_t width, float alpha, Matrix out) {
        product.ab(count, width, block.keys, alpha, w.at(from, block.meta), {values, block.key_row(), group}, 0,
                   out.at(from, 0));
        if (block.meta)
            product.ab(count, width, block.meta, alpha, w.at(from, 0), {values, 0, group}, 1, out.at(from, 0));
    }

    void forward() {
        Matrix all(scores, block.columns), to = weights();
        multiply_runs(0, rows, gathered(query, p.width), p.k, p.width, scale, all);
        Floats sums(rows), output(rows * p.value_width);
        for (int64_t row = 0; row < rows; row++) {
            int64_t at = row % block.queries;
            V top = splat(-INFINITY), total{};
            block.each_seen(at, [&](int64_t column, int lanes) {
                V v = load(all.rows(), row, column, lanes);
                if (lanes < W) v = first_lanes(v, lanes, -INFINITY);
                top = v > top ? v : top;
            });
            float high = highest(top);
            block.each_seen(at, [&](int64_t column, int lanes) {
                V weights = exp(load(all.rows(), row, column, lanes) - high);
                store(to.rows(), row, column, lanes, weights);
                total += lanes < W ? first_lanes(weights, lanes, 0) : weights;
            });
            block.clear_unseen(to, row, at);
            float whole = sums.data()[row] = sum(total);
            p.lse[packed_row(row) * p.heads + head(row)] = high + std::log(whole);
        }
        Matrix attended(output, p.value_width);
        sum_runs(0, rows, to, p.v, p.value_width, 1, attended);
        for (int64_t row = 0; row < rows; row++) {
            Rows y = p.y.at(packed_row(row), head(row));
            each_vector(p.value_width, [&](int64_t column, int lanes) {
                store(y, 0, column, lanes, load(attended.rows(), row, column, lanes) * (1.f / sums.data()[row]));
            });
        }
    }

    // Computes the weights of some rows, and the gradients of their scores and queries.
    void backward_rows(int64_t from, int64_t end) {
        Matrix all(scores, block.columns), d_all(d_weights, block.columns), to = weights(), d_to = d_scores();
        Matrix d_out = gathered(d_output, p.value_width);
        multiply_runs(from, end - from, gathered(query, p.width), p.k, p.width, scale, all);
        multiply_runs(from, end - from, d_out, p.v, p.value_width, 1, d_all);
        for (int64_t row = from; row < end; row++) {
            int64_t at = row % block.queries;
            Rows y = p.y.at(packed_row(row), head(row));
            V dots{};
            each_vector(p.value_width, [&](int64_t column, int lanes) {
                dots += load(d_out.rows(), row, column, lanes) * load(y, 0, column, lanes);
            });
            float inner = sum(dots), lse = p.lse[packed_row(row) * p.heads + head(row)];
            block.each_seen(at, [&](int64_t column, int lanes) {
                V weights = exp(load(all.rows(), row, column, lanes) - lse);
                V d_score = weights * (load(d_all.rows(), row, column, lanes) - inner);
                store(to.rows(), row, column, lanes, weights);
                store(d_to.rows(), row, column, lanes, d_score);
            });
            block.clear_unseen(to, row, at);
            block.clear_unseen(d_to, row, at);
        }
        Floats d_query((end - from) * p.width);
        Matrix d_queries(d_query, p.width);
        sum_runs(from, end - from, d_to, p.k, p.width, scale, {d_query.data() - from * p.width, p.width, 0});
        for (int64_t row = from; row < end; row++) {
            Rows dq = p.dq.at(packed_row(row), head(row));
            each_vector(p.width, [&](int64_t column, int lanes) {
                store(dq, 0, column, lanes, load(d_queries.rows(), row - from, column, lanes));
            });
        }
    }

    // Adds the gradients of the keys and values in some columns, from all rows.
    void backward_columns(int64_t from, int64_t end) {
        for (int run = 0; run < 2; run++) {
            int64_t begin = std::max(from, run ? block.meta : 0);
            int64_t count = std::min(end, run ? block.columns : block.meta) - begin;
            if (count <= 0) continue;
            int64_t index = (run ? begin - block.meta + block.key_row() : begin) * p.groups + group;
            float *dk = p.dk + index * p.width, *dv = p.dv + index * p.value_width;
            product.aTb(count, p.width, rows, scale, d_scores().at(0, begin), gathered(query, p.width), 1,
                        {dk, p.groups * p.width, 0});
            product.aTb(count, p.value_width, rows, 1, weights().at(0, begin), gathered(d_output, p.value_width), 1,
                        {dv, p.groups * p.value_width, 0});
        }
    }
};

}  // namespace

extern "C" void forward(const Attention *attention) {
    const Attention &p = *attention;
    parallel(p.threads, Block::count(p) * p.groups, [&](int64_t item) {
        // The last blocks come first: without a window they see the most keys and take longest.
        Workspace(p, Block(p, Block::count(p) - 1 - item / p.groups), item % p.groups, false).forward();
    });
}

extern "C" void backward(const Attention *attention) {
    const Attention &p = *attention;
    for (int64_t index = 0; index < Block::count(p); index++)
        for (int64_t group = 0; group < p.groups; group++) {
            Workspace workspace(p, Block(p, index), group, true);
            auto share = [&](int64_t total, int64_t part) { return total * part / p.threads; };
            parallel(p.threads, p.threads, [&](int64_t part) {
                workspace.backward_rows(share(workspace.rows, part), share(workspace.rows, part + 1));
            });
            parallel(p.threads, p.threads, [&](int64_t part) {
                const int64_t columns = workspace.block.columns;
                workspace.backward_columns(share(columns, part), share(columns, part + 1));
            });
        }
}
"""
)

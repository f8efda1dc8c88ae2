"""The C++ source of the norms, gates and rotations, which `elementwise_native` compiles."""

from .native_vectors import VECTORS

SOURCE = (
    VECTORS
    + r"""
// Norm, gate and rotation, forward and backward. Each reads its inputs once or twice and writes its outputs once.
//
// The rows are divided into STRIPS strips whatever the number of threads, so that the result does not depend on it.

namespace {

template <class Work> void each_strip(int64_t threads, int64_t rows, Work work) {
    parallel(threads, STRIPS, [=](int64_t strip) { work(strip, strip * rows / STRIPS, (strip + 1) * rows / STRIPS); });
}

struct Norm {
    int64_t rows, heads, width, threads;
    float eps;
    Grid x, y, dy, dx;
    const float *weight;    // (heads, width), or (width) with a stride of 0
    int64_t weight_stride;
    float *scale;           // (rows, heads)
    float *d_weights;       // (STRIPS, heads or 1, width), or null
};

// The mean of two norms, of a and of b.
struct MeanOfNorms {
    int64_t rows, width, threads;
    float eps;
    Rows a, b, y, dy, da, db;
    const float *a_weight, *b_weight;
    float *scales;     // (rows, 2)
    float *d_weights;  // (STRIPS, 2, width), or null
};

// Without gradients: the sum of two rows and its norm, or without an update the norm of x alone.
struct AddNorm {
    int64_t rows, width, threads;
    float eps;
    Rows x, update, weight, total, y;
};

// Without gradients: the mean of two norms, of a and of b.
struct FinalMean {
    int64_t rows, width, threads;
    float eps;
    Rows a, b, a_weight, b_weight, y;
};

struct Gate {
    int64_t rows, width, threads;
    Rows gate, up, y, dy, d_gate, d_up;
};

struct Rotation {
    int64_t rows, heads, width, threads;
    float direction;  // 1, or -1 in the backward
    Grid x, y;
    Rows cos, sin;
};

// The reciprocal of the root mean square of a row.
inline float scale_of(const Rows &x, int64_t row, int64_t width, float eps) {
    V squares{};
    each_vector(width, [&](int64_t column, int lanes) {
        V v = load(x, row, column, lanes);
        squares += v * v;
    });
    return 1.f / std::sqrt(sum(squares) / width + eps);
}

// Computes the gradient of a row, and adds the row's part to the gradient of the weight; dy is multiplied by a factor.
inline void norm_row_backward(const Rows &x, const Rows &dy, const Rows &dx, int64_t row, int64_t width, float factor,
                              float scale, const float *weight, float *d_weight) {
    V inner{};
    each_vector(width, [&](int64_t column, int lanes) {
        V product = load(dy, row, column, lanes) * load(x, row, column, lanes) * (scale * factor);
        inner += product * load(weight + column, lanes);
        if (!d_weight) return;
        V total = load(d_weight + column, lanes) + product;
        copy<float>(d_weight + column, &total, lanes);
    });
    if (!dx.data) return;
    float mean = sum(inner) / width;
    each_vector(width, [&](int64_t column, int lanes) {
        V normed = load(x, row, column, lanes) * scale;
        V d_normed = load(dy, row, column, lanes) * factor * load(weight + column, lanes);
        store(dx, row, column, lanes, (d_normed - normed * mean) * scale);
    });
}

}  // namespace

extern "C" void norm_forward(const Norm *p) {
    each_strip(p->threads, p->rows, [=](int64_t, int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; r++)
            for (int64_t h = 0; h < p->heads; h++) {
                Rows x = p->x.at(r, h), y = p->y.at(r, h);
                const float *weight = p->weight + h * p->weight_stride;
                float scale = p->scale[r * p->heads + h] = scale_of(x, 0, p->width, p->eps);
                each_vector(p->width, [&](int64_t column, int lanes) {
                    V normed = rounded(load(x, 0, column, lanes) * scale, x.bf16);
                    store(y, 0, column, lanes, normed * load(weight + column, lanes));
                });
            }
    });
}

extern "C" void add_norm(const AddNorm *p) {
    each_strip(p->threads, p->rows, [=](int64_t, int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; r++) {
            const Rows &total = p->update.data ? p->total : p->x;
            each_vector(p->update.data ? p->width : 0, [&](int64_t column, int lanes) {
                store(total, r, column, lanes, load(p->x, r, column, lanes) + load(p->update, r, column, lanes));
            });
            float scale = scale_of(total, r, p->width, p->eps);
            each_vector(p->width, [&](int64_t column, int lanes) {
                V normed = rounded(load(total, r, column, lanes) * scale, total.bf16);
                store(p->y, r, column, lanes, normed * load(p->weight, 0, column, lanes));
            });
        }
    });
}

extern "C" void final_mean(const FinalMean *p) {
    each_strip(p->threads, p->rows, [=](int64_t, int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; r++) {
            float a_scale = scale_of(p->a, r, p->width, p->eps), b_scale = scale_of(p->b, r, p->width, p->eps);
            each_vector(p->width, [&](int64_t column, int lanes) {
                V a = load(p->a, r, column, lanes) * a_scale * load(p->a_weight, 0, column, lanes);
                V b = load(p->b, r, column, lanes) * b_scale * load(p->b_weight, 0, column, lanes);
                store(p->y, r, column, lanes, (a + b) * .5f);
            });
        }
    });
}

extern "C" void norm_backward(const Norm *p) {
    each_strip(p->threads, p->rows, [=](int64_t strip, int64_t begin, int64_t end) {
        int64_t weights = (p->weight_stride ? p->heads : 1) * p->width;
        float *d_weight = p->d_weights ? p->d_weights + strip * weights : nullptr;
        if (d_weight) std::fill(d_weight, d_weight + weights, 0.f);
        for (int64_t r = begin; r < end; r++)
            for (int64_t h = 0; h < p->heads; h++)
                norm_row_backward(p->x.at(r, h), p->dy.at(r, h), p->dx.data ? p->dx.at(r, h) : Rows{}, 0, p->width, 1,
                                  p->scale[r * p->heads + h], p->weight + h * p->weight_stride,
                                  d_weight ? d_weight + h * p->weight_stride : nullptr);
    });
}

extern "C" void mean_of_norms_forward(const MeanOfNorms *p) {
    each_strip(p->threads, p->rows, [=](int64_t, int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; r++) {
            float a_scale = p->scales[2 * r] = scale_of(p->a, r, p->width, p->eps);
            float b_scale = p->scales[2 * r + 1] = scale_of(p->b, r, p->width, p->eps);
            each_vector(p->width, [&](int64_t column, int lanes) {
                V a = load(p->a, r, column, lanes) * a_scale * load(p->a_weight + column, lanes);
                V b = load(p->b, r, column, lanes) * b_scale * load(p->b_weight + column, lanes);
                store(p->y, r, column, lanes, (a + b) * .5f);
            });
        }
    });
}

extern "C" void mean_of_norms_backward(const MeanOfNorms *p) {
    each_strip(p->threads, p->rows, [=](int64_t strip, int64_t begin, int64_t end) {
        float *d_weights = p->d_weights ? p->d_weights + strip * 2 * p->width : nullptr;
        if (d_weights) std::fill(d_weights, d_weights + 2 * p->width, 0.f);
        for (int64_t r = begin; r < end; r++) {
            norm_row_backward(p->a, p->dy, p->da, r, p->width, .5f, p->scales[2 * r], p->a_weight, d_weights);
            norm_row_backward(p->b, p->dy, p->db, r, p->width, .5f, p->scales[2 * r + 1], p->b_weight,
                              d_weights ? d_weights + p->width : nullptr);
        }
    });
}

extern "C" void gate_forward(const Gate *p) {
    each_strip(p->threads, p->rows, [=](int64_t, int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; r++)
            each_vector(p->width, [&](int64_t column, int lanes) {
                V gate = load(p->gate, r, column, lanes);
                store(p->y, r, column, lanes, gate * sigmoid(gate) * load(p->up, r, column, lanes));
            });
    });
}

extern "C" void gate_backward(const Gate *p) {
    each_strip(p->threads, p->rows, [=](int64_t, int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; r++)
            each_vector(p->width, [&](int64_t column, int lanes) {
                V gate = load(p->gate, r, column, lanes), dy = load(p->dy, r, column, lanes), s = sigmoid(gate);
                V slope = s * (1.f + gate * (1.f - s));
                store(p->d_gate, r, column, lanes, dy * load(p->up, r, column, lanes) * slope);
                store(p->d_up, r, column, lanes, dy * gate * s);
            });
    });
}

extern "C" void rotate(const Rotation *p) {
    each_strip(p->threads, p->rows, [=](int64_t, int64_t begin, int64_t end) {
        int64_t half = p->width / 2;
        for (int64_t r = begin; r < end; r++)
            for (int64_t h = 0; h < p->heads; h++) {
                Rows x = p->x.at(r, h), y = p->y.at(r, h);
                each_vector(half, [&](int64_t column, int lanes) {
                    V first = load(x, 0, column, lanes), second = load(x, 0, half + column, lanes);
                    V first_sin = load(p->sin, r, column, lanes), second_sin = load(p->sin, r, half + column, lanes);
                    V first_cos = load(p->cos, r, column, lanes), second_cos = load(p->cos, r, half + column, lanes);
                    store(y, 0, column, lanes, first * first_cos - second * first_sin * p->direction);
                    store(y, 0, half + column, lanes, second * second_cos + first * second_sin * p->direction);
                });
            }
    });
}
"""
)

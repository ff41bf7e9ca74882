// Attention in both directions over sequences of different lengths, one behind the other.
//
// A task is one head of one sequence: its keys are laid out with a feature of all tokens together,
// so that a vector of scores is computed at a time without a reduction. Every row is computed in one
// order, so it depends neither on the rows beside it nor on the other sequences.
#include <cmath>
#include <vector>

#include "vector.h"

namespace rs {
namespace {

// Query rows that share what is read of keys and values: enough sums that none waits for itself.
constexpr int kRows = kLanes > 8 ? 4 : 8;

// Features [0, dim) of `rows` tokens that lie `stride` apart, as floats `padded` apart.
template <class T>
void widen(const T* x, int64_t stride, int64_t rows, int64_t dim, int64_t padded, float* out) {
    for (int64_t row = 0; row < rows; ++row) {
        for (int64_t d = 0; d < dim; d += kLanes) {
            store(out + row * padded + d, load_some(x + row * stride + d, dim - d));
        }
    }
}

struct Head {
    int64_t length, dim, padded_length, padded_dim;
    float* queries;  // [kRows, padded dim], scaled
    float* keys;     // [dim, padded length]
    float* values;   // [length, padded dim]
    float* scores;   // [kRows, padded length]

    // scores[r, j] = 2^(q_r k_j - largest); returns 1 / their sum in `inverse`.
    void score(float* inverse) const {
        for (int64_t j = 0; j < padded_length; j += kLanes) {
            Floats sums[kRows];
            for (auto& sum : sums) sum = zeros();
            for (int64_t d = 0; d < dim; ++d) {
                const Floats key = load(keys + d * padded_length + j);
#pragma GCC unroll 8
                for (int r = 0; r < kRows; ++r) {
                    const Floats query = all(queries[r * padded_dim + d]);
                    sums[r] = multiply_add(query, key, sums[r]);
                }
            }
            for (int r = 0; r < kRows; ++r) {
                store(scores + r * padded_length + j, sums[r]);
            }
        }
        for (int r = 0; r < kRows; ++r) inverse[r] = weigh(scores + r * padded_length);
    }

    float weigh(float* row) const {
        const Floats lowest = all(-INFINITY);
        Floats largest = lowest;
        for (int64_t j = 0; j < length; j += kLanes) {
            const Floats part = load(row + j);
            largest = maximum(largest, choose(first_lanes(length - j), part, lowest));
        }
        const Floats top = all(largest_of(largest));
        Floats sum = zeros();
        for (int64_t j = 0; j < length; j += kLanes) {
            const Floats power = exp2(load(row + j) - top);
            const Floats weight = keep(first_lanes(length - j), power);
            store(row + j, weight);
            sum = sum + weight;
        }
        return 1.0f / sum_of(sum);
    }

    // out[r, d] = sum_j scores[r, j] * values[j, d] * inverse[r]
    template <class T>
    void mix(const float* inverse, int rows, T* out, int64_t stride) const {
        for (int64_t d = 0; d < dim; d += kLanes) {
            Floats sums[kRows];
            for (auto& sum : sums) sum = zeros();
            for (int64_t j = 0; j < length; ++j) {
                const Floats value = load(values + j * padded_dim + d);
#pragma GCC unroll 8
                for (int r = 0; r < kRows; ++r) {
                    const Floats weight = all(scores[r * padded_length + j]);
                    sums[r] = multiply_add(weight, value, sums[r]);
                }
            }
            for (int r = 0; r < rows; ++r) {
                store_some(out + r * stride + d, sums[r] * all(inverse[r]), dim - d);
            }
        }
    }
};

template <class T>
void attend_head(const T* q, const T* k, const T* v, T* out, int64_t length, int64_t dim,
                 int64_t stride, int64_t out_stride) {
    const int64_t padded_length = round_up(length, kLanes), padded_dim = round_up(dim, kLanes);
    const int64_t sizes[] = {kRows * padded_dim, dim * padded_length, length * padded_dim,
                             kRows * padded_length};
    std::vector<float> room(sizes[0] + sizes[1] + sizes[2] + sizes[3]);
    float* at = room.data();
    const Head head{length, dim, padded_length, padded_dim, at, at + sizes[0],
                    at + sizes[0] + sizes[1], at + sizes[0] + sizes[1] + sizes[2]};
    widen(k, stride, length, dim, padded_dim, head.values);  // Only on their way to `keys`.
    for (int64_t j = 0; j < length; ++j) {
        for (int64_t d = 0; d < dim; ++d) {
            head.keys[d * padded_length + j] = head.values[j * padded_dim + d];
        }
    }
    widen(v, stride, length, dim, padded_dim, head.values);
    const float scale = kLog2E / std::sqrt(static_cast<float>(dim));
    for (int64_t row = 0; row < length; row += kRows) {
        const int rows = static_cast<int>(std::min<int64_t>(kRows, length - row));
        widen(q + row * stride, stride, rows, dim, padded_dim, head.queries);
        for (int64_t i = 0; i < rows * padded_dim; ++i) head.queries[i] *= scale;
        float inverse[kRows];
        head.score(inverse);
        head.mix(inverse, rows, out + row * out_stride, out_stride);
    }
}

template <class T>
void attend_all(const T* q, const T* k, const T* v, T* out, const int64_t* starts,
                int64_t sequences, int64_t heads, int64_t dim, int64_t stride, int threads) {
    const int64_t out_stride = heads * dim;
    parallel_tasks(sequences * heads, threads, [&](int64_t task) {
        const int64_t sequence = task / heads, head = task % heads;
        const int64_t first = starts[sequence], length = starts[sequence + 1] - first;
        const int64_t from = first * stride + head * dim;
        T* const to = out + first * out_stride + head * dim;
        attend_head(q + from, k + from, v + from, to, length, dim, stride, out_stride);
    });
}

}  // namespace
}  // namespace rs

// out[t, h] = softmax(q[t, h] k[:, h] / sqrt(dim)) v[:, h] within each sequence: tokens
// [starts[n], starts[n + 1]) are sequence n. Values are float or (is_half) bfloat16; rows of q, k and
// v lie `stride` apart, rows of out side by side.
RS_EXPORT void rs_attend_ragged(const void* q, const void* k, const void* v, void* out,
                                int32_t is_half, const int64_t* starts, int64_t sequences,
                                int64_t heads, int64_t dim, int64_t stride, int32_t threads) {
    if (is_half) {
        using T = rs::Bfloat16;
        rs::attend_all(static_cast<const T*>(q), static_cast<const T*>(k), static_cast<const T*>(v),
                       static_cast<T*>(out), starts, sequences, heads, dim, stride, threads);
        return;
    }
    rs::attend_all(static_cast<const float*>(q), static_cast<const float*>(k),
                   static_cast<const float*>(v), static_cast<float*>(out), starts, sequences, heads,
                   dim, stride, threads);
}

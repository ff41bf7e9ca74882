// What happens between the matrix products of a decoder: look-up, normalisation, gating.
//
// Every row is computed on its own, in one order, so it does not depend on the rows beside it.
// Variants that end in `quantize` write the row in int8 (see quantize.h) instead of in floats.
#include "elementwise.h"

#include <cmath>
#include <cstring>

#include "quantize.h"

namespace rs {
namespace {

constexpr int64_t kRowsPerTask = 4;

// body(row) for all rows, in tasks of a few; few rows are done sooner than a thread is woken.
template <class Body>
void for_rows(int64_t rows, int threads, const Body& body) {
    const int64_t tasks = ceil_div(rows, kRowsPerTask);
    parallel_tasks(tasks, static_cast<int>(std::min<int64_t>(threads, tasks)), [&](int64_t task) {
        const int64_t last = std::min(rows, (task + 1) * kRowsPerTask);
        for (int64_t row = task * kRowsPerTask; row < last; ++row) body(row);
    });
}

inline float inverse_rms(const float* x, int64_t width, float eps) {
    Floats sums[4] = {zeros(), zeros(), zeros(), zeros()};
    for (int64_t i = 0; i < width; i += 4 * kLanes) {
#pragma GCC unroll 4
        for (int64_t chain = 0; chain < 4; ++chain) {
            const int64_t first = i + chain * kLanes;
            const Floats part = load_some(x + first, width - first);
            sums[chain] = multiply_add(part, part, sums[chain]);
        }
    }
    const Floats sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    return 1.0f / std::sqrt(sum_of(sum) / static_cast<float>(width) + eps);
}

// Vector i of a row, normalised.
inline Floats normal_part(const float* x, const float* weight, int64_t i, int64_t width,
                          Floats inverse) {
    return load_some(weight + i, width - i) * (load_some(x + i, width - i) * inverse);
}

// Where the int8 form of rows goes.
struct Quantized {
    int8_t* values;
    float* scales;
    int32_t* sums;

    template <class Load>
    void put(int64_t row, int64_t width, const Load& load) const {
        const int64_t stride = padded_inputs(width);
        quantize_row(width, load, values + row * stride, scales + row,
                     sums + row * (stride / kSumBlock));
    }
};

}  // namespace
}  // namespace rs

// y[row] = embedding[tokens[row]], widened to float; the embedding is float or (is_half) bfloat16.
RS_EXPORT void rs_embed(const void* embedding, int32_t is_half, const int64_t* tokens, float* y,
                        int64_t rows, int64_t width, int32_t threads) {
    rs::for_rows(rows, threads, [=](int64_t row) {
        float* out = y + row * width;
        if (!is_half) {
            const float* in = static_cast<const float*>(embedding) + tokens[row] * width;
            std::memcpy(out, in, width * sizeof(float));
            return;
        }
        const auto* in = static_cast<const rs::Bfloat16*>(embedding) + tokens[row] * width;
        for (int64_t i = 0; i < width; i += rs::kLanes) {
            rs::store_some(out + i, rs::load_some(in + i, width - i), width - i);
        }
    });
}

// y = weight * x / root mean square of x (Zhang and Sennrich 2019), for rows `x_stride` apart.
RS_EXPORT void rs_rms_norm(const float* x, const float* weight, float* y, int64_t rows,
                           int64_t width, int64_t x_stride, float eps, int32_t threads) {
    rs::for_rows(rows, threads, [=](int64_t row) {
        const float* in = x + row * x_stride;
        const rs::Floats inverse = rs::all(rs::inverse_rms(in, width, eps));
        for (int64_t i = 0; i < width; i += rs::kLanes) {
            const rs::Floats part = rs::normal_part(in, weight, i, width, inverse);
            rs::store_some(y + row * width + i, part, width - i);
        }
    });
}

RS_EXPORT void rs_rms_norm_quantize(const float* x, const float* weight, int8_t* values,
                                    float* scales, int32_t* sums, int64_t rows, int64_t width,
                                    int64_t x_stride, float eps, int32_t threads) {
    const rs::Quantized quantized{values, scales, sums};
    rs::for_rows(rows, threads, [=](int64_t row) {
        const float* in = x + row * x_stride;
        const rs::Floats inverse = rs::all(rs::inverse_rms(in, width, eps));
        quantized.put(row, width, [=](int64_t i) {
            return rs::normal_part(in, weight, i, width, inverse);
        });
    });
}

// y[row] = silu(gate) * up of x[row] = [gate, up], each `width` floats. y may be x's own memory,
// with y_stride = x_stride.
RS_EXPORT void rs_silu_mul(const float* x, float* y, int64_t rows, int64_t width, int64_t x_stride,
                           int64_t y_stride, int32_t threads) {
    rs::for_rows(rows, threads, [=](int64_t row) {
        const float* in = x + row * x_stride;
        for (int64_t i = 0; i < width; i += rs::kLanes) {
            const rs::Floats gate = rs::load_some(in + i, width - i);
            const rs::Floats up = rs::load_some(in + width + i, width - i);
            rs::store_some(y + row * y_stride + i, rs::gated(gate, up), width - i);
        }
    });
}

// What happens between the matrix products of a decoder: look-up, normalisation, gating.
//
// Every row is computed on its own, in one order, so it does not depend on the rows beside it.
// Variants that end in `quantize` write the row in int8 (see quantize.h) instead of in floats.
#include "elementwise.h"

#include <cmath>
#include <cstring>

#include "quantize.h"
#include "vector.h"

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

inline __m512 load_part(const float* x, int64_t i, int64_t width) {
    return _mm512_maskz_loadu_ps(first_lanes(width - i), x + i);
}

inline float inverse_rms(const float* x, int64_t width, float eps) {
    __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(),
                      _mm512_setzero_ps()};
    for (int64_t i = 0; i < width; i += 64) {
#pragma GCC unroll 4
        for (int64_t lane = 0; lane < 4; ++lane) {
            const __m512 part = load_part(x, i + 16 * lane, width);
            sums[lane] = _mm512_fmadd_ps(part, part, sums[lane]);
        }
    }
    const __m512 sum =
        _mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3]));
    return 1.0f / std::sqrt(_mm512_reduce_add_ps(sum) / static_cast<float>(width) + eps);
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
        int64_t i = 0;
        for (; i + 16 <= width; i += 16) _mm512_storeu_ps(out + i, rs::load16(in + i));
        for (; i < width; ++i) {
            const uint32_t bits = static_cast<uint32_t>(in[i]) << 16;
            std::memcpy(out + i, &bits, sizeof(bits));
        }
    });
}

// y = weight * x / root mean square of x (Zhang and Sennrich 2019), for rows `x_stride` apart.
RS_EXPORT void rs_rms_norm(const float* x, const float* weight, float* y, int64_t rows,
                           int64_t width, int64_t x_stride, float eps, int32_t threads) {
    rs::for_rows(rows, threads, [=](int64_t row) {
        const float* in = x + row * x_stride;
        const __m512 inverse = _mm512_set1_ps(rs::inverse_rms(in, width, eps));
        for (int64_t i = 0; i < width; i += 16) {
            const __m512 normal = _mm512_mul_ps(rs::load_part(in, i, width), inverse);
            const __m512 out = _mm512_mul_ps(rs::load_part(weight, i, width), normal);
            _mm512_mask_storeu_ps(y + row * width + i, rs::first_lanes(width - i), out);
        }
    });
}

RS_EXPORT void rs_rms_norm_quantize(const float* x, const float* weight, int8_t* values,
                                    float* scales, int32_t* sums, int64_t rows, int64_t width,
                                    int64_t x_stride, float eps, int32_t threads) {
    const rs::Quantized quantized{values, scales, sums};
    rs::for_rows(rows, threads, [=](int64_t row) {
        const float* in = x + row * x_stride;
        const __m512 inverse = _mm512_set1_ps(rs::inverse_rms(in, width, eps));
        quantized.put(row, width, [=](int64_t i) {
            const __m512 normal = _mm512_mul_ps(rs::load_part(in, i, width), inverse);
            return _mm512_mul_ps(rs::load_part(weight, i, width), normal);
        });
    });
}

// y[row] = silu(gate) * up of x[row] = [gate, up], each `width` floats. y may be x's own memory,
// with y_stride = x_stride.
RS_EXPORT void rs_silu_mul(const float* x, float* y, int64_t rows, int64_t width, int64_t x_stride,
                           int64_t y_stride, int32_t threads) {
    rs::for_rows(rows, threads, [=](int64_t row) {
        const float* in = x + row * x_stride;
        for (int64_t i = 0; i < width; i += 16) {
            const __m512 gate = rs::load_part(in, i, width);
            const __m512 up = rs::load_part(in + width, i, width);
            _mm512_mask_storeu_ps(y + row * y_stride + i, rs::first_lanes(width - i),
                                  rs::gated(gate, up));
        }
    });
}

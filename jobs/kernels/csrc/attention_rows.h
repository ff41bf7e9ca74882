// Heads of one token on their way into and out of a cache: normalised, rotated, rounded.
#pragma once

#include <cmath>

#include "attention.h"
#include "vector.h"

namespace rs {

constexpr int64_t kMaxDim = 256;  // of a head; native_ops.py refuses more

// 1 / root mean square of x [dim].
inline float inverse_rms(const float* x, int64_t dim, float eps) {
    Floats sum = zeros();
    for (int64_t i = 0; i < dim; i += kLanes) {
        const Floats part = load_some(x + i, dim - i);
        sum = multiply_add(part, part, sum);
    }
    return 1.0f / std::sqrt(sum_of(sum) / static_cast<float>(dim) + eps);
}

// out = one head of a token, normalised and rotated as the pass asks, times `factor`.
inline void prepare_head(const float* x, const float* norm, float eps, const Angles& angles,
                         int64_t dim, float factor, float* out) {
    const Floats inverse = all(norm ? inverse_rms(x, dim, eps) : 1.0f);
    const auto part = [&](int64_t i, int64_t count) {
        const Floats raw = load_some(x + i, count);
        return norm ? load_some(norm + i, count) * (raw * inverse) : raw;
    };
    if (!angles.cos) {
        for (int64_t i = 0; i < dim; i += kLanes) {
            store_some(out + i, part(i, dim - i) * all(factor), dim - i);
        }
        return;
    }
    const int64_t half = dim / 2;
    for (int64_t i = 0; i < half; i += kLanes) {
        const int64_t count = half - i;
        const Floats first = part(i, count), second = part(half + i, count);
        const Floats c = load_some(angles.cos + i, count), s = load_some(angles.sin + i, count);
        store_some(out + i, (first * c - second * s) * all(factor), count);
        store_some(out + half + i, (second * c + first * s) * all(factor), count);
    }
}

inline void store_head(float* out, const float* x, int64_t dim) { std::copy_n(x, dim, out); }

inline void store_head(Bfloat16* out, const float* x, int64_t dim) {
    for (int64_t d = 0; d < dim; d += kLanes) {
        store_some(out + d, load_some(x + d, dim - d), dim - d);
    }
}

// As formats.quantize_rows; returns the scale.
inline float store_head(int8_t* out, const float* x, int64_t dim) {
    Floats largest = zeros();
    for (int64_t d = 0; d < dim; d += kLanes) {
        largest = maximum(largest, magnitude(load_some(x + d, dim - d)));
    }
    const float step = largest_of(largest) / 127.0f;
    const float scale = step < 1e-12f ? 1e-12f : step;
    for (int64_t d = 0; d < dim; d += kLanes) {
        store_some(out + d, load_some(x + d, dim - d) / all(scale), dim - d);
    }
    return scale;
}

}  // namespace rs

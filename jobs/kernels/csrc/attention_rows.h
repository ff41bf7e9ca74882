// Heads of one token on their way into and out of a cache: normalised, rotated, rounded.
#pragma once

#include <cmath>

#include "attention.h"
#include "vector.h"

namespace rs {

constexpr int64_t kMaxDim = 256;  // of a head; native_ops.py refuses more

// 1 / root mean square of x [dim].
inline float inverse_rms(const float* x, int64_t dim, float eps) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < dim; i += 16) {
        const __m512 part = _mm512_maskz_loadu_ps(first_lanes(dim - i), x + i);
        sum = _mm512_fmadd_ps(part, part, sum);
    }
    return 1.0f / std::sqrt(_mm512_reduce_add_ps(sum) / static_cast<float>(dim) + eps);
}

// out = one head of a token, normalised and rotated as the pass asks, times `factor`.
inline void prepare_head(const float* x, const float* norm, float eps, const Angles& angles,
                         int64_t dim, float factor, float* out) {
    const __m512 all = _mm512_set1_ps(factor);
    const __m512 inverse = _mm512_set1_ps(norm ? inverse_rms(x, dim, eps) : 1.0f);
    const auto load = [&](int64_t i, __mmask16 lanes) {
        const __m512 raw = _mm512_maskz_loadu_ps(lanes, x + i);
        if (!norm) return raw;
        return _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, norm + i), _mm512_mul_ps(raw, inverse));
    };
    if (!angles.cos) {
        for (int64_t i = 0; i < dim; i += 16) {
            const __mmask16 lanes = first_lanes(dim - i);
            _mm512_mask_storeu_ps(out + i, lanes, _mm512_mul_ps(load(i, lanes), all));
        }
        return;
    }
    const int64_t half = dim / 2;
    for (int64_t i = 0; i < half; i += 16) {
        const __mmask16 lanes = first_lanes(half - i);
        const __m512 first = load(i, lanes), second = load(half + i, lanes);
        const __m512 c = _mm512_maskz_loadu_ps(lanes, angles.cos + i);
        const __m512 s = _mm512_maskz_loadu_ps(lanes, angles.sin + i);
        const __m512 left = _mm512_sub_ps(_mm512_mul_ps(first, c), _mm512_mul_ps(second, s));
        const __m512 right = _mm512_add_ps(_mm512_mul_ps(second, c), _mm512_mul_ps(first, s));
        _mm512_mask_storeu_ps(out + i, lanes, _mm512_mul_ps(left, all));
        _mm512_mask_storeu_ps(out + half + i, lanes, _mm512_mul_ps(right, all));
    }
}

inline void store(float* out, const float* x, int64_t dim) { std::copy_n(x, dim, out); }

inline void store(Bfloat16* out, const float* x, int64_t dim) {
    for (int64_t d = 0; d < dim; d += 16) {
        const __mmask16 lanes = first_lanes(dim - d);
        const __m512 part = _mm512_maskz_loadu_ps(lanes, x + d);
        _mm256_mask_storeu_epi16(out + d, lanes, to_bfloat16(part));
    }
}

// As formats.quantize_rows; returns the scale.
inline float store(int8_t* out, const float* x, int64_t dim) {
    __m512 largest = _mm512_setzero_ps();
    for (int64_t d = 0; d < dim; d += 16) {
        const __m512 part = _mm512_maskz_loadu_ps(first_lanes(dim - d), x + d);
        largest = _mm512_max_ps(largest, _mm512_abs_ps(part));
    }
    const float step = _mm512_reduce_max_ps(largest) / 127.0f;
    const float scale = step < 1e-12f ? 1e-12f : step;
    for (int64_t d = 0; d < dim; d += 16) {
        const __mmask16 lanes = first_lanes(dim - d);
        const __m512 part = _mm512_maskz_loadu_ps(lanes, x + d);
        const __m512i steps = _mm512_cvtps_epi32(_mm512_div_ps(part, _mm512_set1_ps(scale)));
        _mm_mask_storeu_epi8(out + d, lanes, _mm512_cvtsepi32_epi8(steps));
    }
    return scale;
}

}  // namespace rs

// Rows of activations in int8, as every integer kernel reads them.
//
// values  int8  [N, stride]       zero behind the row's end; stride = padded_inputs(I)
// scales  float [N]               x is about values * scale
// sums    int32 [N, stride / 32]  sum of the values of every 32 inputs
//
// Weights are stored unsigned, since the CPU multiplies unsigned by signed bytes; the sums take the
// offset out again: sum x * w = sum x * (w + offset) - offset * sum x.
#pragma once

#include "common.h"

namespace rs {

constexpr int64_t kInputBlock = 64;  // inputs are padded to a multiple of this
constexpr int64_t kSumBlock = 32;    // inputs that share a sum; every group size is a multiple

inline int64_t padded_inputs(int64_t inputs) { return round_up(inputs, kInputBlock); }

struct QuantizedRows {
    const int8_t* values;
    const float* scales;
    const int32_t* sums;
    int64_t rows;
    int64_t stride;  // bytes from row to row; sums lie stride / 32 apart

    const int8_t* row(int64_t n) const { return values + n * stride; }
    const int32_t* row_sums(int64_t n) const { return sums + n * (stride / kSumBlock); }
};

// Quantize one row given in 16-lane pieces: load(i) gives inputs [i, i + 16), zeros behind the end.
// It is called twice for every i, first for the largest value, then to round. Rounds and divides
// exactly as formats.quantize_rows does.
template <class Load>
inline void quantize_row(int64_t inputs, const Load& load, int8_t* values, float* scale,
                         int32_t* sums) {
    __m512 largest = _mm512_setzero_ps();
    for (int64_t i = 0; i < inputs; i += 16) {
        largest = _mm512_max_ps(largest, _mm512_abs_ps(load(i)));
    }
    const float step = _mm512_reduce_max_ps(largest) / 127.0f;
    *scale = step < 1e-12f ? 1e-12f : step;
    const __m512 divisor = _mm512_set1_ps(*scale);
    const auto round = [&](int64_t i) {
        if (i >= inputs) return _mm_setzero_si128();
        // 127 steps at most, so that saturation is for NaN alone.
        return _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_div_ps(load(i), divisor)));
    };
    for (int64_t i = 0; i < inputs; i += kInputBlock) {
        const __m256i low = _mm256_set_m128i(round(i + 16), round(i));
        const __m256i high = _mm256_set_m128i(round(i + 48), round(i + 32));
        const __m512i bytes = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
        _mm512_storeu_si512(values + i, bytes);
        // Sums of eight bytes, made unsigned, then of four neighbours of these.
        const __m512i offset = _mm512_xor_si512(bytes, _mm512_set1_epi8(-128));
        __m512i sum = _mm512_sad_epu8(offset, _mm512_setzero_si512());
        sum = _mm512_add_epi64(sum, _mm512_permutex_epi64(sum, 0b10110001));
        sum = _mm512_add_epi64(sum, _mm512_permutex_epi64(sum, 0b01001110));
        const __m256i sums32 = _mm512_cvtepi64_epi32(sum);
        constexpr int32_t kOffset = 128 * kSumBlock;
        sums[i / kSumBlock] = _mm_cvtsi128_si32(_mm256_castsi256_si128(sums32)) - kOffset;
        sums[i / kSumBlock + 1] = _mm_cvtsi128_si32(_mm256_extracti128_si256(sums32, 1)) - kOffset;
    }
}

// The same for a row in memory.
inline void quantize_row(int64_t inputs, const float* x, int8_t* values, float* scale,
                         int32_t* sums) {
    const auto load = [=](int64_t i) {
        return _mm512_maskz_loadu_ps(first_lanes(inputs - i), x + i);
    };
    quantize_row(inputs, load, values, scale, sums);
}

}  // namespace rs

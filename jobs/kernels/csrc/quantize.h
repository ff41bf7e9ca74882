// Rows of activations in int8, as every integer kernel reads them.
//
// values  int8  [N, stride]       zero behind the row's end; stride = padded_inputs(I)
// scales  float [N]               x is about values * scale
// sums    int32 [N, stride / 32]  sum of the values of every 32 inputs
//
// Weights are stored unsigned, since the CPU multiplies unsigned by signed bytes; the sums take the
// offset out again: sum x * w = sum x * (w + offset) - offset * sum x.
#pragma once

#include "vector.h"

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

// Quantize one row given in vectors: load(i) gives inputs [i, i + kLanes), zeros behind the end. It
// is called twice for every i, first for the largest value, then to round. Rounds and divides
// exactly as formats.quantize_rows does.
template <class Load>
inline void quantize_row(int64_t inputs, const Load& load, int8_t* values, float* scale,
                         int32_t* sums) {
    Floats largest = zeros();
    for (int64_t i = 0; i < inputs; i += kLanes) largest = maximum(largest, magnitude(load(i)));
    const float step = largest_of(largest) / 127.0f;
    *scale = step < 1e-12f ? 1e-12f : step;
    const Floats divisor = all(*scale);
    for (int64_t i = 0; i < padded_inputs(inputs); i += kSumBlock) {
        Floats steps[kSumBlock / kLanes];
#pragma GCC unroll 4
        for (int64_t v = 0; v < kSumBlock / kLanes; ++v) {
            const int64_t first = i + v * kLanes;
            steps[v] = first < inputs ? load(first) / divisor : zeros();
        }
        // 127 steps at most, so that saturation is for NaN alone.
        const __m256i bytes = to_bytes(steps);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(values + i), bytes);
        // Sums of eight bytes, made unsigned, then of these.
        const __m256i offset = _mm256_xor_si256(bytes, _mm256_set1_epi8(-128));
        const __m256i fours = _mm256_sad_epu8(offset, _mm256_setzero_si256());
        const __m128i twos =
            _mm_add_epi32(_mm256_castsi256_si128(fours), _mm256_extracti128_si256(fours, 1));
        const int32_t sum = _mm_cvtsi128_si32(twos) + _mm_extract_epi32(twos, 2);
        sums[i / kSumBlock] = sum - 128 * kSumBlock;
    }
}

// The same for a row in memory.
inline void quantize_row(int64_t inputs, const float* x, int8_t* values, float* scale,
                         int32_t* sums) {
    const auto load = [=](int64_t i) { return load_some(x + i, inputs - i); };
    quantize_row(inputs, load, values, scale, sums);
}

}  // namespace rs

// Small vector functions: 16 floats read from any storage type, and powers of two.
#pragma once

#include "common.h"

namespace rs {

using Bfloat16 = uint16_t;

// Sixteen values in memory as floats.
inline __m512 load16(const float* x) { return _mm512_loadu_ps(x); }
inline __m512 load16(const Bfloat16* x) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline __m512 load16(const int8_t* x) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
}

// Round to nearest, ties to even, as torch does.
inline __m256i to_bfloat16(__m512 x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_add_epi32(bits, bias), 16));
}

// 2^x to 2 units in the last place: a polynomial (Taylor's, in x ln 2) on [-1/2, 1/2], scaled by
// the whole part of x. Underflows to 0, overflows to infinity; NaN stays NaN.
inline __m512 exp2(__m512 x) {
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 rest = _mm512_sub_ps(x, whole);
    __m512 y = _mm512_set1_ps(1.5252734e-5f);
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(1.5403530e-4f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(1.3333558e-3f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(9.6181291e-3f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(5.5504109e-2f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(2.4022651e-1f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(6.9314718e-1f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(y, whole);
}

constexpr float kLog2E = 1.44269504f;

// silu(gate) * up = gate / (1 + e^-gate) * up. Beyond what a float holds the power is infinity or
// zero, as it must.
inline __m512 gated(__m512 gate, __m512 up) {
    const __m512 power = exp2(_mm512_mul_ps(gate, _mm512_set1_ps(-kLog2E)));
    const __m512 silu = _mm512_div_ps(gate, _mm512_add_ps(power, _mm512_set1_ps(1.0f)));
    return _mm512_mul_ps(silu, up);
}

}  // namespace rs

// Vectors of 16 floats: AVX-512 with VNNI. See vector.h; vector_avx2.h has the same functions.
#pragma once

#include "common.h"

#define RS_VNNI 1  // four products of bytes and their sum in one instruction

namespace rs {

constexpr int64_t kLanes = 16;
constexpr int kRegisters = 32;
constexpr int64_t kVectorBytes = 64;

using Floats = __m512;
using Ints = __m512i;  // 16 of 32 bits, or bytes
using Lanes = __mmask16;

// The first `count` lanes; none below 1, all from kLanes on.
inline Lanes first_lanes(int64_t count) {
    return count >= kLanes ? static_cast<Lanes>(0xFFFF)
                           : static_cast<Lanes>((1u << (count < 0 ? 0 : count)) - 1);
}
inline Lanes without(Lanes lanes, Lanes others) { return static_cast<Lanes>(lanes & ~others); }
inline Lanes both(Lanes a, Lanes b) { return static_cast<Lanes>(a & b); }
inline Lanes either(Lanes a, Lanes b) { return static_cast<Lanes>(a | b); }
inline Lanes no_lanes() { return 0; }
inline bool any(Lanes lanes) { return lanes != 0; }
inline int lowest(Lanes lanes) { return __builtin_ctz(lanes); }

inline Floats all(float x) { return _mm512_set1_ps(x); }
inline Ints all(int32_t x) { return _mm512_set1_epi32(x); }
inline Floats zeros() { return _mm512_setzero_ps(); }

// Values in memory as floats.
inline Floats load(const float* x) { return _mm512_loadu_ps(x); }
inline Floats load(const Bfloat16* x) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline Floats load(const int8_t* x) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
}
// The first `count` of them, as first_lanes counts; zero in the other lanes. No more is read.
inline Floats load_some(const float* x, int64_t count) {
    return _mm512_maskz_loadu_ps(first_lanes(count), x);
}
inline Floats load_some(const Bfloat16* x, int64_t count) {
    const __m256i bits = _mm256_maskz_loadu_epi16(first_lanes(count), x);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline Ints load_bits(const void* x) { return _mm512_loadu_si512(x); }

// Round to nearest, ties to even, as torch does.
inline __m256i to_bfloat16(Floats x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_add_epi32(bits, bias), 16));
}

inline void store(float* y, Floats x) { _mm512_storeu_ps(y, x); }
// Rounded to whole numbers, ties to even; beyond a byte's range its ends.
inline __m128i to_bytes(Floats x) { return _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x)); }
// The same of 32 numbers.
inline __m256i to_bytes(const Floats (&x)[2]) {
    return _mm256_set_m128i(to_bytes(x[1]), to_bytes(x[0]));
}
// The first `count` lanes, as first_lanes counts. No more is written.
inline void store_some(float* y, Floats x, int64_t count) {
    _mm512_mask_storeu_ps(y, first_lanes(count), x);
}
inline void store_some(Bfloat16* y, Floats x, int64_t count) {
    _mm256_mask_storeu_epi16(y, first_lanes(count), to_bfloat16(x));
}
inline void store_some(int8_t* y, Floats x, int64_t count) {
    _mm_mask_storeu_epi8(y, first_lanes(count), to_bytes(x));
}

// x in some lanes, zero in the others.
inline Floats keep(Lanes lanes, Floats x) { return _mm512_maskz_mov_ps(lanes, x); }
// x in some lanes, `other` in the others.
inline Floats choose(Lanes lanes, Floats x, Floats other) {
    return _mm512_mask_mov_ps(other, lanes, x);
}
// Where either is NaN, b.
inline Floats maximum(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats magnitude(Floats x) { return _mm512_abs_ps(x); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline float sum_of(Floats x) { return _mm512_reduce_add_ps(x); }
inline float largest_of(Floats x) { return _mm512_reduce_max_ps(x); }
inline float first_of(Floats x) { return _mm512_cvtss_f32(x); }
inline Lanes are_equal(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
inline Lanes are_nan(Floats x) { return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q); }

// The steps of exp2. Powers need no bounds here: vscalefps takes any.
inline Floats within_powers(Floats x) { return x; }
inline Floats round_to_whole(Floats x) {
    return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline Floats times_power_of_two(Floats x, Floats power) { return _mm512_scalef_ps(x, power); }

// Whole numbers.
inline Floats to_floats(Ints x) { return _mm512_cvtepi32_ps(x); }
inline Floats as_floats(Ints bits) { return _mm512_castsi512_ps(bits); }
inline Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
inline Ints bits_of(Ints a, Ints mask) { return _mm512_and_si512(a, mask); }
template <int kCount>
inline Ints shift_left(Ints x) { return _mm512_slli_epi32(x, kCount); }

// Weights from bits [4 i, 4 i + 4) of each lane, which hold weight + 8. vpermps ignores other bits.
inline Floats int4_weights(Ints bits, int i) {
    const Floats values = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    return _mm512_permutexvar_ps(_mm512_srli_epi32(bits, 4 * i), values);
}

}  // namespace rs

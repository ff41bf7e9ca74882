// Vectors of 8 floats: AVX2 with FMA. See vector.h; vector_avx512.h has the same functions, but for
// products of int8 rows.
#pragma once

#include "common.h"

namespace rs {

constexpr int64_t kLanes = 8;
constexpr int kRegisters = 16;
constexpr int64_t kVectorBytes = 32;

using Floats = __m256;
using Ints = __m256i;  // 8 of 32 bits, or bytes
struct Lanes {         // all bits of a lane, or none
    __m256i bits;
};

// The first `count` lanes; none below 1, all from kLanes on.
inline Lanes first_lanes(int64_t count) {
    const int32_t bound = static_cast<int32_t>(std::clamp<int64_t>(count, 0, kLanes));
    const __m256i numbers = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return {_mm256_cmpgt_epi32(_mm256_set1_epi32(bound), numbers)};
}
inline Lanes without(Lanes lanes, Lanes others) {
    return {_mm256_andnot_si256(others.bits, lanes.bits)};
}
inline Lanes both(Lanes a, Lanes b) { return {_mm256_and_si256(a.bits, b.bits)}; }
inline Lanes either(Lanes a, Lanes b) { return {_mm256_or_si256(a.bits, b.bits)}; }
inline Lanes no_lanes() { return {_mm256_setzero_si256()}; }
inline int as_number(Lanes lanes) { return _mm256_movemask_ps(_mm256_castsi256_ps(lanes.bits)); }
inline bool any(Lanes lanes) { return as_number(lanes) != 0; }
inline int lowest(Lanes lanes) { return __builtin_ctz(as_number(lanes)); }

inline Floats all(float x) { return _mm256_set1_ps(x); }
inline Ints all(int32_t x) { return _mm256_set1_epi32(x); }
inline Floats zeros() { return _mm256_setzero_ps(); }

// Values in memory as floats.
inline Floats widen(__m128i bfloat16s) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bfloat16s), 16));
}
inline Floats load(const float* x) { return _mm256_loadu_ps(x); }
inline Floats load(const Bfloat16* x) {
    return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
}
inline Floats load(const int8_t* x) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(x));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
}
// The first `count` of them, as first_lanes counts; zero in the other lanes. No more is read.
inline Floats load_some(const float* x, int64_t count) {
    if (count >= kLanes) return load(x);
    return _mm256_maskload_ps(x, first_lanes(count).bits);
}
inline Floats load_some(const Bfloat16* x, int64_t count) {
    if (count >= kLanes) return load(x);
    Bfloat16 some[kLanes] = {};
    std::copy_n(x, count, some);
    return load(some);
}
inline Ints load_bits(const void* x) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(x));
}

// Round to nearest, ties to even, as torch does.
inline __m128i to_bfloat16(Floats x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    const __m256i high = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}

inline void store(float* y, Floats x) { _mm256_storeu_ps(y, x); }
// 32 numbers, rounded to whole ones, ties to even; beyond a byte's range its ends.
inline __m256i to_bytes(const Floats (&x)[4]) {
    const __m256i low = _mm256_packs_epi32(_mm256_cvtps_epi32(x[0]), _mm256_cvtps_epi32(x[1]));
    const __m256i high = _mm256_packs_epi32(_mm256_cvtps_epi32(x[2]), _mm256_cvtps_epi32(x[3]));
    // Packing keeps to the halves of a vector: fours of numbers come out as 0 2 4 6 1 3 5 7.
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    return _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
}
// The first `count` lanes, as first_lanes counts. No more is written. Whole vectors are told apart
// since stores with a mask take dozens of cycles on AMD's CPUs.
inline void store_some(float* y, Floats x, int64_t count) {
    if (count >= kLanes) return store(y, x);
    _mm256_maskstore_ps(y, first_lanes(count).bits, x);
}
inline void store_some(Bfloat16* y, Floats x, int64_t count) {
    const __m128i halves = to_bfloat16(x);
    if (count >= kLanes) return _mm_storeu_si128(reinterpret_cast<__m128i*>(y), halves);
    __builtin_memcpy(y, &halves, std::max<int64_t>(count, 0) * sizeof(Bfloat16));
}
inline void store_some(int8_t* y, Floats x, int64_t count) {
    const __m128i bytes = _mm256_castsi256_si128(to_bytes({x, x, x, x}));
    if (count >= kLanes) return _mm_storel_epi64(reinterpret_cast<__m128i*>(y), bytes);
    __builtin_memcpy(y, &bytes, std::max<int64_t>(count, 0));
}

// x in some lanes, zero in the others.
inline Floats keep(Lanes lanes, Floats x) {
    return _mm256_and_ps(_mm256_castsi256_ps(lanes.bits), x);
}
// x in some lanes, `other` in the others.
inline Floats choose(Lanes lanes, Floats x, Floats other) {
    return _mm256_blendv_ps(other, x, _mm256_castsi256_ps(lanes.bits));
}
// Where either is NaN, b.
inline Floats maximum(Floats a, Floats b) { return _mm256_max_ps(a, b); }
inline Floats magnitude(Floats x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline float sum_of(Floats x) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}
inline float largest_of(Floats x) {
    __m128 top = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    top = _mm_max_ps(top, _mm_movehl_ps(top, top));
    return _mm_cvtss_f32(_mm_max_ss(top, _mm_movehdup_ps(top)));
}
inline float first_of(Floats x) { return _mm256_cvtss_f32(x); }
inline Lanes are_equal(Floats a, Floats b) {
    return {_mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_EQ_OQ))};
}
inline Lanes are_nan(Floats x) {
    return {_mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q))};
}

// The steps of exp2. Beyond these bounds a power is zero or infinity for certain; NaN stays.
inline Floats within_powers(Floats x) {
    return _mm256_min_ps(_mm256_set1_ps(254.0f), _mm256_max_ps(_mm256_set1_ps(-252.0f), x));
}
inline Floats round_to_whole(Floats x) {
    return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline Floats times_power_of_two(Floats x, Floats power) {
    // In two steps, each of which is a float: the whole may be none while the product is one.
    const __m256i whole = _mm256_cvtps_epi32(power), half = _mm256_srai_epi32(whole, 1);
    const auto two_to_the = [](__m256i n) {
        return _mm256_castsi256_ps(
            _mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
    };
    return x * two_to_the(half) * two_to_the(_mm256_sub_epi32(whole, half));
}

// Whole numbers.
inline Floats to_floats(Ints x) { return _mm256_cvtepi32_ps(x); }
inline Floats as_floats(Ints bits) { return _mm256_castsi256_ps(bits); }
inline Ints add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
inline Ints bits_of(Ints a, Ints mask) { return _mm256_and_si256(a, mask); }
template <int kCount>
inline Ints shift_left(Ints x) { return _mm256_slli_epi32(x, kCount); }

// Weights from bits [4 i, 4 i + 4) of each lane, which hold weight + 8.
inline Floats int4_weights(Ints bits, int i) {
    const __m256i value = _mm256_and_si256(_mm256_srli_epi32(bits, 4 * i), _mm256_set1_epi32(15));
    return _mm256_cvtepi32_ps(_mm256_sub_epi32(value, _mm256_set1_epi32(8)));
}

// Sixteen bytes as numbers of 16 bits.
inline Ints widen_bytes(const void* bytes) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(static_cast<const __m128i*>(bytes)));
}
// Products of numbers of 16 bits, the two of each lane added.
inline Ints multiply_pairs(Ints a, Ints b) { return _mm256_madd_epi16(a, b); }
// Products of unsigned by signed bytes, neighbours added to numbers of 16 bits: they must fit.
inline Ints multiply_bytes(Ints a, Ints b) { return _mm256_maddubs_epi16(a, b); }
inline Ints add_halves(Ints a, Ints b) { return _mm256_add_epi16(a, b); }
// A sum that is made before others that begin with it. GCC else adds what comes later first, for
// which there are no registers.
inline Ints in_order(Ints sum) {
    asm("" : "+x"(sum));
    return sum;
}
// The two numbers of 16 bits of each lane, added.
inline Ints sum_pairs(Ints halves) { return _mm256_madd_epi16(halves, _mm256_set1_epi16(1)); }

}  // namespace rs

// Vectors of floats as the CPU at hand has them, and what is computed with them everywhere.
//
// A kernel is written once, for vectors of kLanes floats. What a vector is, and how it is loaded,
// chosen from and summed up, says vector_avx512.h or vector_avx2.h. Arithmetic on Floats is written
// with operators, which GCC and Clang give to vector types.
#pragma once

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && \
    defined(__AVX512VL__) && defined(__AVX512VNNI__)
#include "vector_avx512.h"
#elif defined(__AVX2__) && defined(__FMA__)
#include "vector_avx2.h"
#else
#error "the kernels need AVX2 and FMA"
#endif

namespace rs {

// 2^x to 2 units in the last place: a polynomial (Taylor's, in x ln 2) on [-1/2, 1/2], scaled by
// the whole part of x. Underflows to 0, overflows to infinity; NaN stays NaN.
inline Floats exp2(Floats x) {
    x = within_powers(x);
    const Floats whole = round_to_whole(x);
    const Floats rest = x - whole;
    Floats y = all(1.5252734e-5f);
    y = multiply_add(y, rest, all(1.5403530e-4f));
    y = multiply_add(y, rest, all(1.3333558e-3f));
    y = multiply_add(y, rest, all(9.6181291e-3f));
    y = multiply_add(y, rest, all(5.5504109e-2f));
    y = multiply_add(y, rest, all(2.4022651e-1f));
    y = multiply_add(y, rest, all(6.9314718e-1f));
    y = multiply_add(y, rest, all(1.0f));
    return times_power_of_two(y, whole);
}

constexpr float kLog2E = 1.44269504f;

// silu(gate) * up = gate / (1 + e^-gate) * up. Beyond what a float holds the power is infinity or
// zero, as it must.
inline Floats gated(Floats gate, Floats up) {
    const Floats power = exp2(gate * all(-kLog2E));
    return gate / (power + all(1.0f)) * up;
}

}  // namespace rs

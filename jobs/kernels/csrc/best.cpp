// The largest value of every row, and where it stands: what greedy decoding takes from logits.
#include <cmath>

#include "common.h"

namespace rs {
namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kStep = 4 * kLanes;
constexpr int64_t kParallelValues = 1 << 16;  // fewer are read sooner than a thread is woken

struct Best {
    float value;
    int64_t at;
};

// The first place in x [count] for which is_it(16 values) says yes; `count` if there is none.
template <class IsIt>
int64_t find_first(const float* x, int64_t count, const IsIt& is_it) {
    for (int64_t i = 0; i < count; i += kLanes) {
        const __mmask16 inside = first_lanes(count - i);
        const __mmask16 found = inside & is_it(_mm512_maskz_loadu_ps(inside, x + i));
        if (found) return i + __builtin_ctz(found);
    }
    return count;
}

// The lowest of equals; NaN is larger than any number, as in torch.max.
Best find_best(const float* x, int64_t count) {
    const __m512 lowest = _mm512_set1_ps(-INFINITY);
    __m512 largest[4] = {lowest, lowest, lowest, lowest};
    __mmask16 is_nan = 0;
    for (int64_t i = 0; i < count; i += kStep) {
#pragma GCC unroll 4
        for (int64_t part = 0; part < 4; ++part) {
            const int64_t at = i + part * kLanes;
            const __m512 values = _mm512_mask_loadu_ps(lowest, first_lanes(count - at), x + at);
            is_nan |= _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
            largest[part] = _mm512_max_ps(largest[part], values);
        }
    }
    if (is_nan) {
        const auto unordered = [](__m512 v) { return _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q); };
        return {NAN, find_first(x, count, unordered)};
    }
    const float best = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(largest[0], largest[1]),
                                                          _mm512_max_ps(largest[2], largest[3])));
    const __m512 all = _mm512_set1_ps(best);
    const auto equal = [&](__m512 v) { return _mm512_cmp_ps_mask(v, all, _CMP_EQ_OQ); };
    return {best, find_first(x, count, equal)};
}

}  // namespace
}  // namespace rs

// best[n] = largest of x [rows, count], whose rows lie behind one another; ids[n] is its place.
RS_EXPORT void rs_find_best(const float* x, float* best, int64_t* ids, int64_t rows, int64_t count,
                            int32_t threads) {
    if (rows * count < rs::kParallelValues) threads = 1;
    rs::parallel_tasks(rows, threads, [&](int64_t row) {
        const rs::Best found = rs::find_best(x + row * count, count);
        best[row] = found.value;
        ids[row] = found.at;
    });
}

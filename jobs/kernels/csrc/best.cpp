// The largest value of every row, and where it stands: what greedy decoding takes from logits.
#include <cmath>

#include "vector.h"

namespace rs {
namespace {

constexpr int64_t kParallelValues = 1 << 16;  // fewer are read sooner than a thread is woken

struct Best {
    float value;
    int64_t at;
};

// The first place in x [count] for which is_it(vector) says yes; `count` if there is none.
template <class IsIt>
int64_t find_first(const float* x, int64_t count, const IsIt& is_it) {
    for (int64_t i = 0; i < count; i += kLanes) {
        const Lanes found = both(first_lanes(count - i), is_it(load_some(x + i, count - i)));
        if (any(found)) return i + lowest(found);
    }
    return count;
}

// The lowest of equals; NaN is larger than any number, as in torch.max.
Best find_best(const float* x, int64_t count) {
    const Floats lowest = all(-INFINITY);
    Floats largest[4] = {lowest, lowest, lowest, lowest};
    Lanes nans = no_lanes();
    for (int64_t i = 0; i < count; i += 4 * kLanes) {
#pragma GCC unroll 4
        for (int64_t part = 0; part < 4; ++part) {
            const int64_t at = i + part * kLanes;
            const Floats some = load_some(x + at, count - at);
            const Floats values = choose(first_lanes(count - at), some, lowest);
            nans = either(nans, are_nan(values));
            largest[part] = maximum(largest[part], values);
        }
    }
    if (any(nans)) return {NAN, find_first(x, count, are_nan)};
    const float best =
        largest_of(maximum(maximum(largest[0], largest[1]), maximum(largest[2], largest[3])));
    const auto is_best = [&](Floats v) { return are_equal(v, all(best)); };
    return {best, find_first(x, count, is_best)};
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

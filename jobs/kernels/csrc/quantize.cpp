#include "quantize.h"

#include "products.h"

// Quantize `rows` rows of x, `x_stride` floats apart; see quantize.h for what is written.
RS_EXPORT void rs_quantize_rows(const float* x, int8_t* values, float* scales, int32_t* sums,
                                int64_t rows, int64_t inputs, int64_t x_stride, int32_t threads) {
    const int64_t stride = rs::padded_inputs(inputs);
    constexpr int64_t kRowsPerTask = 8;
    rs::parallel_tasks(rs::ceil_div(rows, kRowsPerTask), threads, [&](int64_t task) {
        const int64_t last = std::min(rows, (task + 1) * kRowsPerTask);
        for (int64_t n = task * kRowsPerTask; n < last; ++n) {
            rs::quantize_row(inputs, x + n * x_stride, values + n * stride, scales + n,
                             sums + n * (stride / rs::kSumBlock));
        }
    });
}

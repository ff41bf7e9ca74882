// The products of linear_*.cpp and the rounding of their rows, as others call them.
#pragma once

#include "common.h"

namespace rs {

// What a product does with y. The last needs two halves of whole blocks (linear.h): the first half are
// gates of the second, and y [N, outputs / 2] becomes silu(gate) * up, bitwise as rs_silu_mul makes
// it.
enum class Mode : int32_t { kSet = 0, kAdd = 1, kGate = 2 };

}  // namespace rs

RS_EXPORT void rs_quantize_rows(const float* x, int8_t* values, float* scales, int32_t* sums,
                                int64_t rows, int64_t inputs, int64_t x_stride, int32_t threads);
RS_EXPORT void rs_linear_dense(const float* x, const uint8_t* packed, const float* bias, float* y,
                               int64_t rows, int64_t inputs, int64_t outputs, int64_t x_stride,
                               int64_t y_stride, rs::Mode mode, int32_t threads);
RS_EXPORT void rs_linear_w8a8(const int8_t* values, const float* row_scales, const int32_t* sums,
                              const uint8_t* packed, const float* scales, const float* bias,
                              float* y, int64_t rows, int64_t inputs, int64_t outputs,
                              int64_t y_stride, rs::Mode mode, int32_t threads);
RS_EXPORT void rs_linear_w4a16(const float* x, const uint8_t* packed, const float* bias, float* y,
                               int64_t rows, int64_t inputs, int64_t outputs, int64_t group,
                               int64_t x_stride, int64_t y_stride, rs::Mode mode,
                               int32_t threads);
RS_EXPORT void rs_linear_w8a16(const float* x, const uint8_t* packed, const float* bias, float* y,
                               int64_t rows, int64_t inputs, int64_t outputs, int64_t group,
                               int64_t x_stride, int64_t y_stride, rs::Mode mode,
                               int32_t threads);
RS_EXPORT void rs_linear_w4a8(const int8_t* values, const float* row_scales, const int32_t* sums,
                              const uint8_t* packed, const float* bias, float* y, int64_t rows,
                              int64_t inputs, int64_t outputs, int64_t group, int64_t y_stride,
                              rs::Mode mode, int32_t threads);

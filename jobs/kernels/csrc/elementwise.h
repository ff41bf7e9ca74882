// The kernels of elementwise.cpp, as others call them; each is described there.
#pragma once

#include "common.h"

RS_EXPORT void rs_embed(const void* embedding, int32_t is_half, const int64_t* tokens, float* y,
                        int64_t rows, int64_t width, int32_t threads);
RS_EXPORT void rs_rms_norm(const float* x, const float* weight, float* y, int64_t rows,
                           int64_t width, int64_t x_stride, float eps, int32_t threads);
RS_EXPORT void rs_rms_norm_quantize(const float* x, const float* weight, int8_t* values,
                                    float* scales, int32_t* sums, int64_t rows, int64_t width,
                                    int64_t x_stride, float eps, int32_t threads);
RS_EXPORT void rs_silu_mul(const float* x, float* y, int64_t rows, int64_t width, int64_t x_stride,
                           int64_t y_stride, int32_t threads);

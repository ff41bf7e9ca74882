// W4A8: int4 weights with a scale per group of inputs, rows quantized to int8.
//
// Within a group sums are exact integers; groups are added in float32, in order.
#include <numeric>
#include <vector>

#include "linear_int4.h"
#include "quantize.h"

namespace rs {
namespace {

struct W4A8 {
    static constexpr int kMaxRows = 12;

    QuantizedRows x;
    Int4Weights w;
    const int32_t* offsets;  // [rows, groups]: what the weights' offset of 8 adds, negated
    Output out;
    int64_t block_bytes;

    const uint8_t* weights(int64_t block) const { return w.packed + block * block_bytes; }

    template <int R>
    void tile(int64_t row, int64_t block, Prefetch prefetch) const {
        const __m512i nibble = _mm512_set1_epi8(15);
        __m512 totals[R][kVectors];
        RS_UNROLL for (int r = 0; r < R; ++r) {
            out.fetch(row + r, block);
            totals[r][0] = totals[r][1] = _mm512_setzero_ps();
        }
        const uint8_t* at = weights(block);
        RowReader<R> inputs(x.row(row), x.stride);
        const int64_t groups = w.groups();
        for (int64_t g = 0; g < groups; ++g) {
            const __m512i scales = _mm512_load_si512(at);
            at += kLine;
            __m512i sums[R][kVectors];
            RS_UNROLL for (int r = 0; r < R; ++r) {
                sums[r][0] = sums[r][1] = _mm512_set1_epi32(offsets[(row + r) * groups + g]);
            }
            const uint8_t* end = at + w.group / kStepInputs * kStep;
            for (; at < end; at += kStep, inputs.advance(kStepInputs)) {
                prefetch.step();
                __m512i low[kVectors], high[kVectors];
                RS_UNROLL for (int v = 0; v < kVectors; ++v) {
                    const __m512i bytes = _mm512_load_si512(at + v * kLine);
                    low[v] = _mm512_and_si512(bytes, nibble);
                    high[v] = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), nibble);
                }
                RS_UNROLL for (int r = 0; r < R; ++r) {
                    const __m512i first = inputs.broadcast(r);
                    sums[r][0] = _mm512_dpbusd_epi32(sums[r][0], low[0], first);
                    sums[r][1] = _mm512_dpbusd_epi32(sums[r][1], low[1], first);
                    const __m512i second = inputs.broadcast(r, 4);
                    sums[r][0] = _mm512_dpbusd_epi32(sums[r][0], high[0], second);
                    sums[r][1] = _mm512_dpbusd_epi32(sums[r][1], high[1], second);
                }
            }
            const __m512 scale[kVectors] = {widen_low(scales), widen_high(scales)};
            RS_UNROLL for (int r = 0; r < R; ++r) {
                RS_UNROLL for (int v = 0; v < kVectors; ++v) {
                    totals[r][v] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[r][v]), scale[v],
                                                   totals[r][v]);
                }
            }
        }
        out.store<R>(row, block, [&](int r, int v) {
            return _mm512_mul_ps(totals[r][v], _mm512_set1_ps(x.scales[row + r]));
        });
    }
};

// -8 times the sum of each row's values within each group.
std::vector<int32_t> group_offsets(const QuantizedRows& x, const Int4Weights& w) {
    const int64_t sums_per_group = w.group / kSumBlock;
    std::vector<int32_t> offsets(x.rows * w.groups());
    for (int64_t n = 0; n < x.rows; ++n) {
        for (int64_t g = 0; g < w.groups(); ++g) {
            const int32_t* sums = x.row_sums(n) + g * sums_per_group;
            offsets[n * w.groups() + g] = -8 * std::accumulate(sums, sums + sums_per_group, 0);
        }
    }
    return offsets;
}

}  // namespace
}  // namespace rs

RS_EXPORT void rs_linear_w4a8(const int8_t* values, const float* row_scales, const int32_t* sums,
                              const uint8_t* packed, const float* bias, float* y, int64_t rows,
                              int64_t inputs, int64_t outputs, int64_t group, int64_t y_stride,
                              rs::Mode mode, int32_t threads) {
    const rs::QuantizedRows x{values, row_scales, sums, rows, rs::padded_inputs(inputs)};
    const rs::Int4Weights w{packed, inputs, group};
    const std::vector<int32_t> offsets = rs::group_offsets(x, w);
    const rs::W4A8 kernel{
        x, w, offsets.data(), {y, y_stride, outputs, bias, mode}, w.block_bytes()};
    rs::run_linear(kernel, rows, outputs, threads);
}

// W8A8: int8 weights with a scale per output, rows quantized to int8.
//
// Packed weights: uint8 [blocks, I / 4, 32, 4], each w + 128; I padded to the rows' stride. The sums
// are exact integers: 255 * 127 * I stays below 2^31 up to I = 66,000.
#include <numeric>
#include <vector>

#include "amx.h"

namespace rs {
namespace {

// Fewer rows wait for memory either way (estimated, not measured).
constexpr int64_t kAmxRows = 3;

// The scales of a block's outputs.
struct OutputScales {
    __m512 vectors[kVectors];

    OutputScales(const float* scales, int64_t block)
        : vectors{_mm512_load_ps(scales + block * kBlockOutputs),
                  _mm512_load_ps(scales + block * kBlockOutputs + kLanes)} {}

    __m512 of(__m512i sums, float row_scale, int v) const {
        const __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(sums), _mm512_set1_ps(row_scale));
        return _mm512_mul_ps(y, vectors[v]);
    }
};

struct W8A8 {
    static constexpr int kMaxRows = 12;

    QuantizedRows x;
    const uint8_t* packed;
    const float* scales;
    const int32_t* offsets;  // of each row: what the weights' offset of 128 adds, negated
    Output out;
    int64_t block_bytes;

    const uint8_t* weights(int64_t block) const { return packed + block * block_bytes; }

    template <int R, class Fetch>
    void tile(int64_t row, int64_t block, Fetch fetch) const {
        __m512i sums[R][kVectors];
        RS_UNROLL for (int r = 0; r < R; ++r) {
            sums[r][0] = sums[r][1] = _mm512_set1_epi32(offsets[row + r]);
        }
        const uint8_t* w = weights(block);
        RowReader<R> inputs(x.row(row), x.stride);
        for (const uint8_t* end = w + block_bytes; w < end; w += kStep, inputs.advance()) {
            fetch.step();
            const __m512i w0 = _mm512_load_si512(w), w1 = _mm512_load_si512(w + kLine);
            RS_UNROLL for (int r = 0; r < R; ++r) {
                const __m512i values = inputs.broadcast(r);
                sums[r][0] = _mm512_dpbusd_epi32(sums[r][0], w0, values);
                sums[r][1] = _mm512_dpbusd_epi32(sums[r][1], w1, values);
            }
        }
        const OutputScales scale(scales, block);
        out.store<R>(row, block, [&](int r, int v) {
            return scale.of(sums[r][v], x.scales[row + r], v);
        });
    }

#ifdef RS_AMX
    int64_t step_inputs() const { return kTileInputs; }

    template <bool kHasLower>
    void pass(int64_t row, int64_t rows, int64_t block, TilePrefetch prefetch) const {
        clear_sums(kHasLower);
        const int8_t* values = x.row(row);
        const uint8_t* w = weights(block);
        for (const uint8_t* end = w + block_bytes; w < end; w += kTileStep) {
            prefetch.step(kTileStep);
            add_products<kHasLower>(values, x.stride, w);
            values += kTileInputs;
        }
        PassSums sums;
        sums.take(kHasLower);
        const OutputScales scale(scales, block);
        for (int64_t r = 0; r < rows; ++r) {
            const __m512i offset = _mm512_set1_epi32(offsets[row + r]);
            out.store<1>(row + r, block, [&](int, int v) {
                return scale.of(_mm512_add_epi32(sums.vector(r, v), offset), x.scales[row + r], v);
            });
        }
    }
#endif
};

}  // namespace
}  // namespace rs

RS_EXPORT void rs_linear_w8a8(const int8_t* values, const float* row_scales, const int32_t* sums,
                              const uint8_t* packed, const float* scales, const float* bias,
                              float* y, int64_t rows, int64_t inputs, int64_t outputs,
                              int64_t y_stride, rs::Mode mode, int32_t threads) {
    const int64_t stride = rs::padded_inputs(inputs);
    const rs::QuantizedRows x{values, row_scales, sums, rows, stride};
    std::vector<int32_t> offsets(rows);
    for (int64_t n = 0; n < rows; ++n) {
        const int32_t* row_sums = x.row_sums(n);
        offsets[n] = -128 * std::accumulate(row_sums, row_sums + stride / rs::kSumBlock, 0);
    }
    const rs::W8A8 kernel{x,
                          packed,
                          scales,
                          offsets.data(),
                          {y, y_stride, outputs, bias, mode},
                          stride * rs::kBlockOutputs};
#ifdef RS_AMX
    if (rows >= rs::kAmxRows && rs::has_amx()) {
        rs::run_passes(kernel, rows, rs::ceil_div(outputs, rs::kBlockOutputs), threads);
        return;
    }
#endif
    rs::run_linear(kernel, rows, outputs, threads);
}

// W4A16: int4 weights with a scale per group of inputs, rows in float32.
//
// The activations are taken as they are, in float32: rounding them to bfloat16 would allow
// vdpbf16ps, but then answers would depend on it, and one row waits for memory in either case.
#include "linear_int4.h"

namespace rs {
namespace {

struct W4A16 {
    // Two sums for each of two vectors a row: 24 registers.
    static constexpr int kMaxRows = 6;
    static constexpr int kChains = 2;

    const float* x;
    int64_t x_stride;
    Int4Weights w;
    Output out;
    int64_t block_bytes;

    const uint8_t* weights(int64_t block) const { return w.packed + block * block_bytes; }

    template <int R, class Fetch>
    void tile(int64_t row, int64_t block, Fetch fetch) const {
        // What the four low bits of a lane stand for; vpermps ignores the others.
        const __m512 values =
            _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
        __m512 totals[R][kVectors];
        RS_UNROLL for (int r = 0; r < R; ++r) {
            totals[r][0] = totals[r][1] = _mm512_setzero_ps();
        }
        const uint8_t* at = weights(block);
        const float* inputs = x + row * x_stride;
        for (int64_t g = 0; g < w.groups(); ++g) {
            const __m512i scales = _mm512_load_si512(at);
            at += kLine;
            // Inputs 0-3 and 4-7 of a step are summed apart: a single chain of sums per output
            // would be slower than memory at one row.
            __m512 sums[R][kVectors][kChains];
            RS_UNROLL for (int r = 0; r < R; ++r) {
                RS_UNROLL for (int v = 0; v < kVectors; ++v) {
                    sums[r][v][0] = sums[r][v][1] = _mm512_setzero_ps();
                }
            }
            const float* end = inputs + w.group;
            for (; inputs < end; inputs += kStepInputs, at += kStep) {
                fetch.step();
                const __m512i bytes[kVectors] = {_mm512_load_si512(at),
                                                 _mm512_load_si512(at + kLine)};
                RS_UNROLL for (int i = 0; i < kStepInputs; ++i) {
                    const int chain = i % kChains;
                    __m512 weight[kVectors];
                    RS_UNROLL for (int v = 0; v < kVectors; ++v) {
                        const __m512i nibbles = _mm512_srli_epi32(bytes[v], 4 * i);
                        weight[v] = _mm512_permutexvar_ps(nibbles, values);
                    }
                    RS_UNROLL for (int r = 0; r < R; ++r) {
                        const __m512 input =
                            _mm512_set1_ps(inputs[r * x_stride + i / kChains + 4 * chain]);
                        RS_UNROLL for (int v = 0; v < kVectors; ++v) {
                            sums[r][v][chain] =
                                _mm512_fmadd_ps(weight[v], input, sums[r][v][chain]);
                        }
                    }
                }
            }
            const __m512 scale[kVectors] = {widen_low(scales), widen_high(scales)};
            RS_UNROLL for (int r = 0; r < R; ++r) {
                RS_UNROLL for (int v = 0; v < kVectors; ++v) {
                    const __m512 sum = _mm512_add_ps(sums[r][v][0], sums[r][v][1]);
                    totals[r][v] = _mm512_fmadd_ps(sum, scale[v], totals[r][v]);
                }
            }
        }
        out.store<R>(row, block, [&](int r, int v) { return totals[r][v]; });
    }
};

}  // namespace
}  // namespace rs

RS_EXPORT void rs_linear_w4a16(const float* x, const uint8_t* packed, const float* bias, float* y,
                               int64_t rows, int64_t inputs, int64_t outputs, int64_t group,
                               int64_t x_stride, int64_t y_stride, rs::Mode mode,
                               int32_t threads) {
    const rs::Int4Weights w{packed, inputs, group};
    const rs::W4A16 kernel{
        x, x_stride, w, {y, y_stride, outputs, bias, mode}, w.block_bytes()};
    rs::run_linear(kernel, rows, outputs, threads);
}

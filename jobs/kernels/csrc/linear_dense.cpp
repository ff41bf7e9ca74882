// Dense bfloat16 weights, rows in float32.
//
// Weights are widened, which is exact, and multiplied in float32, so results differ from a float32
// layer's by the order of summation alone. vdpbf16ps would round the rows to 8 bits of mantissa.
// Packed weights: bfloat16 [blocks, I / 2, block's outputs, 2], I padded to even.
#include "linear.h"

namespace rs {
namespace {

struct Dense {
    // Sums beside four vectors of weights and an input.
    static constexpr int kMaxRows = kRegisters > 16 ? 12 : 5;

    const float* x;
    int64_t x_stride;
    int64_t inputs;
    const uint8_t* packed;
    Output out;
    int64_t block_bytes;

    const uint8_t* weights(int64_t block) const { return packed + block * block_bytes; }

    template <int R, class Fetch>
    void tile(int64_t row, int64_t block, Fetch fetch) const {
        Floats sums[R][kVectors];
        RS_UNROLL for (int r = 0; r < R; ++r) {
            sums[r][0] = sums[r][1] = zeros();
        }
        const uint8_t* at = weights(block);
        RowReader<R> rows(x + row * x_stride, x_stride * sizeof(float));
        const auto input = [&](int r, int64_t ahead) {
            return as_floats(rows.broadcast(r, ahead * sizeof(float)));
        };
        for (int64_t i = 0; i + 1 < inputs; i += 2, at += kStep, rows.advance(2 * sizeof(float))) {
            fetch.step();
            Floats first[kVectors], second[kVectors];
            RS_UNROLL for (int v = 0; v < kVectors; ++v) {
                const Ints pairs = load_bits(at + v * kVectorBytes);
                first[v] = widen_low(pairs), second[v] = widen_high(pairs);
            }
            RS_UNROLL for (int r = 0; r < R; ++r) {
                const Floats one = input(r, 0);
                sums[r][0] = multiply_add(first[0], one, sums[r][0]);
                sums[r][1] = multiply_add(first[1], one, sums[r][1]);
                const Floats two = input(r, 1);
                sums[r][0] = multiply_add(second[0], two, sums[r][0]);
                sums[r][1] = multiply_add(second[1], two, sums[r][1]);
            }
        }
        if (inputs % 2) {  // the last has no partner
            RS_UNROLL for (int v = 0; v < kVectors; ++v) {
                const Floats last = widen_low(load_bits(at + v * kVectorBytes));
                RS_UNROLL for (int r = 0; r < R; ++r) {
                    sums[r][v] = multiply_add(last, input(r, 0), sums[r][v]);
                }
            }
        }
        out.store<R>(row, block, [&](int r, int v) { return sums[r][v]; });
    }
};

}  // namespace
}  // namespace rs

RS_EXPORT void rs_linear_dense(const float* x, const uint8_t* packed, const float* bias, float* y,
                               int64_t rows, int64_t inputs, int64_t outputs, int64_t x_stride,
                               int64_t y_stride, rs::Mode mode, int32_t threads) {
    const rs::Dense kernel{x,
                           x_stride,
                           inputs,
                           packed,
                           {y, y_stride, outputs, bias, mode},
                           rs::ceil_div(inputs, 2) * rs::kStep};
    rs::run_linear(kernel, rows, outputs, threads);
}

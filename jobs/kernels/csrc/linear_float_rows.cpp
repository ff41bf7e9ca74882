// W4A16 and W8A16: int4 or int8 weights with a scale per group of inputs, rows in float32.
//
// The activations are taken as they are, in float32: rounding them to bfloat16 would allow
// vdpbf16ps, but then answers would depend on it, and one row waits for memory in either case.
#include "linear_groups.h"

namespace rs {
namespace {

// How a step's weights lie: of vector v those of the step's i-th, and which input that is.
struct Int4Step : Int4Weights {
    static int input(int i) { return i / 2 + i % 2 * 4; }
    static Floats weights(const uint8_t* step, int i, int v) {
        return int4_weights(load_bits(step + v * kVectorBytes), i);
    }
};

struct Int8Step : Int8Weights {
    static int input(int i) { return i; }
    static Floats weights(const uint8_t* step, int i, int v) {
        return load(reinterpret_cast<const int8_t*>(step) + (i * kVectors + v) * kLanes);
    }
};

template <class Weights>
struct FloatRows {
    // Two sums for each of two vectors a row.
    static constexpr int kMaxRows = kRegisters > 16 ? 6 : 2;
    static constexpr int kChains = 2;

    const float* x;
    int64_t x_stride;
    Weights w;
    Output out;
    int64_t block_bytes;

    const uint8_t* weights(int64_t block) const { return w.packed + block * block_bytes; }

    template <int R, class Fetch>
    void tile(int64_t row, int64_t block, Fetch fetch) const {
        Floats totals[R][kVectors];
        RS_UNROLL for (int r = 0; r < R; ++r) {
            totals[r][0] = totals[r][1] = zeros();
        }
        const uint8_t* at = weights(block);
        const float* inputs = x + row * x_stride;
        for (int64_t g = 0; g < w.groups(); ++g) {
            const Ints scales = load_bits(at);
            at += kVectorBytes;
            // Every other weight of a step, as they are read, is summed apart (of int4 inputs 0-3 and
            // 4-7): a single chain of sums per output would be slower than memory at one row.
            Floats sums[R][kVectors][kChains];
            RS_UNROLL for (int r = 0; r < R; ++r) {
                RS_UNROLL for (int v = 0; v < kVectors; ++v) {
                    sums[r][v][0] = sums[r][v][1] = zeros();
                }
            }
            const float* end = inputs + w.group;
            for (; inputs < end; inputs += Weights::kStepInputs, at += kStep) {
                fetch.step();
                RS_UNROLL for (int i = 0; i < Weights::kStepInputs; ++i) {
                    const int chain = i % kChains;
                    Floats weight[kVectors];
                    RS_UNROLL for (int v = 0; v < kVectors; ++v) {
                        weight[v] = Weights::weights(at, i, v);
                    }
                    RS_UNROLL for (int r = 0; r < R; ++r) {
                        const Floats input = all(inputs[r * x_stride + Weights::input(i)]);
                        RS_UNROLL for (int v = 0; v < kVectors; ++v) {
                            sums[r][v][chain] =
                                multiply_add(weight[v], input, sums[r][v][chain]);
                        }
                    }
                }
            }
            const Floats scale[kVectors] = {widen_low(scales), widen_high(scales)};
            RS_UNROLL for (int r = 0; r < R; ++r) {
                RS_UNROLL for (int v = 0; v < kVectors; ++v) {
                    const Floats sum = sums[r][v][0] + sums[r][v][1];
                    totals[r][v] = multiply_add(sum, scale[v], totals[r][v]);
                }
            }
        }
        out.store<R>(row, block, [&](int r, int v) { return totals[r][v]; });
    }
};

template <class Weights>
void multiply(const float* x, const uint8_t* packed, const float* bias, float* y, int64_t rows,
              int64_t inputs, int64_t outputs, int64_t group, int64_t x_stride, int64_t y_stride,
              Mode mode, int32_t threads) {
    const Weights w{{packed, inputs, group}};
    const FloatRows<Weights> kernel{
        x, x_stride, w, {y, y_stride, outputs, bias, mode}, w.block_bytes()};
    run_linear(kernel, rows, outputs, threads);
}

}  // namespace
}  // namespace rs

RS_EXPORT void rs_linear_w4a16(const float* x, const uint8_t* packed, const float* bias, float* y,
                               int64_t rows, int64_t inputs, int64_t outputs, int64_t group,
                               int64_t x_stride, int64_t y_stride, rs::Mode mode,
                               int32_t threads) {
    rs::multiply<rs::Int4Step>(x, packed, bias, y, rows, inputs, outputs, group, x_stride,
                               y_stride, mode, threads);
}

RS_EXPORT void rs_linear_w8a16(const float* x, const uint8_t* packed, const float* bias, float* y,
                               int64_t rows, int64_t inputs, int64_t outputs, int64_t group,
                               int64_t x_stride, int64_t y_stride, rs::Mode mode,
                               int32_t threads) {
    rs::multiply<rs::Int8Step>(x, packed, bias, y, rows, inputs, outputs, group, x_stride,
                               y_stride, mode, threads);
}

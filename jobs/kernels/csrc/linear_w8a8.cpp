// W8A8: int8 weights with a scale per output, rows quantized to int8.
//
// Sums are exact integers. With VNNI, packed weights are uint8 [blocks, I / 4, outputs, 4], each
// w + 128; 255 * 127 * I stays below 2^31 up to I = 66,000. Without, they are int8 [blocks, I / 2,
// outputs, 2] and widened to 16 bits, as are the rows: sums of products of bytes, which AVX2 has,
// leave 16 bits. I is padded to the rows' stride.
#include <memory>
#include <numeric>
#include <vector>

#include "amx.h"

namespace rs {
namespace {

// Fewer rows wait for memory either way (estimated, not measured).
constexpr int64_t kAmxRows = 3;

// The scales of a block's outputs.
struct OutputScales {
    Floats vectors[kVectors];

    OutputScales(const float* scales, int64_t block)
        : vectors{load(scales + block * kBlockOutputs),
                  load(scales + block * kBlockOutputs + kLanes)} {}

    Floats of(Ints sums, float row_scale, int v) const {
        return to_floats(sums) * all(row_scale) * vectors[v];
    }
};

struct W8A8 {
    static constexpr int kMaxRows = kRegisters > 16 ? 12 : 6;

    QuantizedRows x;
    const uint8_t* packed;
    const float* scales;
#ifdef RS_VNNI
    const int32_t* offsets;  // of each row: what the weights' offset of 128 adds, negated
#else
    const int16_t* wide;  // the values of x
#endif
    Output out;
    int64_t block_bytes;

    const uint8_t* weights(int64_t block) const { return packed + block * block_bytes; }

    template <int R, class Fetch>
    void tile(int64_t row, int64_t block, Fetch fetch) const {
        Ints sums[R][kVectors];
        multiply<R>(row, weights(block), fetch, sums);
        const OutputScales scale(scales, block);
        out.store<R>(row, block, [&](int r, int v) {
            return scale.of(sums[r][v], x.scales[row + r], v);
        });
    }

#ifdef RS_VNNI
    template <int R, class Fetch>
    void multiply(int64_t row, const uint8_t* w, Fetch fetch, Ints (&sums)[R][kVectors]) const {
        RS_UNROLL for (int r = 0; r < R; ++r) sums[r][0] = sums[r][1] = all(offsets[row + r]);
        RowReader<R> inputs(x.row(row), x.stride);
        for (const uint8_t* end = w + block_bytes; w < end; w += kStep, inputs.advance()) {
            fetch.step();
            const Ints w0 = load_bits(w), w1 = load_bits(w + kVectorBytes);
            RS_UNROLL for (int r = 0; r < R; ++r) {
                const Ints values = inputs.broadcast(r);
                sums[r][0] = _mm512_dpbusd_epi32(sums[r][0], w0, values);
                sums[r][1] = _mm512_dpbusd_epi32(sums[r][1], w1, values);
            }
        }
    }
#else
    template <int R, class Fetch>
    void multiply(int64_t row, const uint8_t* w, Fetch fetch, Ints (&sums)[R][kVectors]) const {
        RS_UNROLL for (int r = 0; r < R; ++r) sums[r][0] = sums[r][1] = all(int32_t{0});
        RowReader<R> inputs(wide + row * x.stride, x.stride * sizeof(int16_t));
        for (const uint8_t* end = w + block_bytes; w < end; w += kStep, inputs.advance(8)) {
            fetch.step();
            RS_UNROLL for (int pair = 0; pair < 2; ++pair) {
                const uint8_t* at = w + pair * kVectorBytes;
                const Ints w0 = widen_bytes(at), w1 = widen_bytes(at + kVectorBytes / 2);
                RS_UNROLL for (int r = 0; r < R; ++r) {
                    const Ints values = inputs.broadcast(r, 4 * pair);
                    sums[r][0] = in_order(add(sums[r][0], multiply_pairs(w0, values)));
                    sums[r][1] = in_order(add(sums[r][1], multiply_pairs(w1, values)));
                }
            }
        }
    }
#endif

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

#ifdef RS_VNNI
std::vector<int32_t> row_offsets(const QuantizedRows& x) {
    std::vector<int32_t> offsets(x.rows);
    for (int64_t n = 0; n < x.rows; ++n) {
        const int32_t* sums = x.row_sums(n);
        offsets[n] = -kInt8Offset * std::accumulate(sums, sums + x.stride / kSumBlock, 0);
    }
    return offsets;
}
#else
std::unique_ptr<int16_t[]> widen_rows(const QuantizedRows& x, int threads) {
    constexpr int64_t kTaskValues = 1 << 15;  // fewer are widened sooner than a thread is woken
    const int64_t count = x.rows * x.stride;
    std::unique_ptr<int16_t[]> wide(new int16_t[count]);
    parallel_tasks(ceil_div(count, kTaskValues), threads, [&](int64_t task) {
        const int64_t first = task * kTaskValues, last = std::min(count, first + kTaskValues);
        std::copy(x.values + first, x.values + last, wide.get() + first);
    });
    return wide;
}
#endif

}  // namespace
}  // namespace rs

RS_EXPORT void rs_linear_w8a8(const int8_t* values, const float* row_scales, const int32_t* sums,
                              const uint8_t* packed, const float* scales, const float* bias,
                              float* y, int64_t rows, int64_t inputs, int64_t outputs,
                              int64_t y_stride, rs::Mode mode, int32_t threads) {
    const int64_t stride = rs::padded_inputs(inputs);
    const rs::QuantizedRows x{values, row_scales, sums, rows, stride};
#ifdef RS_VNNI
    const auto offsets = rs::row_offsets(x);
    const auto* prepared = offsets.data();
#else
    const auto wide = rs::widen_rows(x, threads);
    const auto* prepared = wide.get();
#endif
    const rs::W8A8 kernel{x,
                          packed,
                          scales,
                          prepared,
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

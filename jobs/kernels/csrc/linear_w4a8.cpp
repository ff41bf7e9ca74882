// W4A8: int4 weights with a scale per group of inputs, rows quantized to int8.
//
// Within a group sums are exact integers; groups are added in float32, in order.
#include <numeric>
#include <vector>

#include "amx.h"
#include "linear_groups.h"

namespace rs {
namespace {

// Of fewer rows, unpacking for tiles takes longer than their products (estimated, not measured).
constexpr int64_t kAmxRows = 4;

struct W4A8 {
    // Of one more the sums do not fit beside what is unpacked, or those of a group.
    static constexpr int kMaxRows = kRegisters > 16 ? 11 : 4;

    QuantizedRows x;
    Int4Weights w;
    const int32_t* offsets;  // [rows, groups]: what the weights' offset of 8 adds, negated
    Output out;
    int64_t block_bytes;

    const uint8_t* weights(int64_t block) const { return w.packed + block * block_bytes; }

    template <int R, class Fetch>
    void tile(int64_t row, int64_t block, Fetch fetch) const {
        Floats totals[R][kVectors];
        RS_UNROLL for (int r = 0; r < R; ++r) totals[r][0] = totals[r][1] = zeros();
        const uint8_t* at = weights(block);
        RowReader<R> inputs(x.row(row), x.stride);
        const int64_t groups = w.groups();
        for (int64_t g = 0; g < groups; ++g) {
            const Ints scales = load_bits(at);
            at += kVectorBytes;
            Ints sums[R][kVectors];
            RS_UNROLL for (int r = 0; r < R; ++r) {
                sums[r][0] = sums[r][1] = all(offsets[(row + r) * groups + g]);
            }
            const uint8_t* end = at + w.group / Int4Weights::kStepInputs * kStep;
            while (at < end) multiply<R>(at, inputs, fetch, sums);
            const Floats scale[kVectors] = {widen_low(scales), widen_high(scales)};
            RS_UNROLL for (int r = 0; r < R; ++r) {
                RS_UNROLL for (int v = 0; v < kVectors; ++v) {
                    totals[r][v] = multiply_add(to_floats(sums[r][v]), scale[v], totals[r][v]);
                }
            }
        }
        out.store<R>(row, block, [&](int r, int v) {
            return totals[r][v] * all(x.scales[row + r]);
        });
    }

#ifdef RS_VNNI
    // Add a step.
    template <int R, class Fetch>
    static void multiply(const uint8_t*& at, RowReader<R>& inputs, Fetch& fetch,
                         Ints (&sums)[R][kVectors]) {
        fetch.step();
        const Ints nibble = _mm512_set1_epi8(15);
        Ints low[kVectors], high[kVectors];
        RS_UNROLL for (int v = 0; v < kVectors; ++v) {
            const Ints bytes = load_bits(at + v * kVectorBytes);
            low[v] = bits_of(bytes, nibble);
            high[v] = bits_of(_mm512_srli_epi16(bytes, 4), nibble);
        }
        RS_UNROLL for (int r = 0; r < R; ++r) {
            const Ints first = inputs.broadcast(r);
            sums[r][0] = _mm512_dpbusd_epi32(sums[r][0], low[0], first);
            sums[r][1] = _mm512_dpbusd_epi32(sums[r][1], low[1], first);
            const Ints second = inputs.broadcast(r, 4);
            sums[r][0] = _mm512_dpbusd_epi32(sums[r][0], high[0], second);
            sums[r][1] = _mm512_dpbusd_epi32(sums[r][1], high[1], second);
        }
        at += kStep;
        inputs.advance(Int4Weights::kStepInputs);
    }
#else
    // Add the steps of 32 inputs: so many products of 15 by 127 can be summed up in 16 bits.
    template <int R, class Fetch>
    static void multiply(const uint8_t*& at, RowReader<R>& inputs, Fetch& fetch,
                         Ints (&sums)[R][kVectors]) {
        const Ints nibble = _mm256_set1_epi8(15);
        Ints halves[R][kVectors];
        RS_UNROLL for (int r = 0; r < R; ++r) halves[r][0] = halves[r][1] = all(int32_t{0});
        const uint8_t* end = at + kSumBlock / Int4Weights::kStepInputs * kStep;
        for (; at < end; at += kStep, inputs.advance(Int4Weights::kStepInputs)) {
            fetch.step();
            RS_UNROLL for (int part = 0; part < 2; ++part) {
                Ints weights[kVectors];
                RS_UNROLL for (int v = 0; v < kVectors; ++v) {
                    const Ints bytes = load_bits(at + v * kVectorBytes);
                    weights[v] = bits_of(part ? _mm256_srli_epi16(bytes, 4) : bytes, nibble);
                }
                RS_UNROLL for (int r = 0; r < R; ++r) {
                    const Ints values = inputs.broadcast(r, 4 * part);
                    RS_UNROLL for (int v = 0; v < kVectors; ++v) {
                        const Ints products = multiply_bytes(weights[v], values);
                        halves[r][v] = in_order(add_halves(halves[r][v], products));
                    }
                }
            }
        }
        RS_UNROLL for (int r = 0; r < R; ++r) {
            RS_UNROLL for (int v = 0; v < kVectors; ++v) {
                sums[r][v] = add(sums[r][v], sum_pairs(halves[r][v]));
            }
        }
    }
#endif

#ifdef RS_AMX
    int64_t step_inputs() const { return w.group % kTileInputs ? kSumBlock : kTileInputs; }

    template <bool kHasLower>
    void pass(int64_t row, int64_t rows, int64_t block, TilePrefetch prefetch) const {
        alignas(64) float totals[kPassRows * kBlockOutputs] = {};
        alignas(64) uint8_t unpacked[kBuffers][kTileStep];
        PassSums sums;
        const int64_t groups = w.groups(), inputs = step_inputs();
        const int64_t step_bytes = inputs / Int4Weights::kStepInputs * kStep;
        const int8_t* values = x.row(row);
        const uint8_t* at = weights(block);
        int buffer = 0;
        for (int64_t g = 0; g < groups; ++g) {
            const __m512i scales = _mm512_load_si512(at);
            at += kLine;
            clear_sums(kHasLower);
            for (int64_t i = 0; i < w.group; i += inputs, at += step_bytes, values += inputs) {
                prefetch.step(step_bytes + (i == 0 ? kLine : 0));  // The group's scales, too.
                buffer = (buffer + 1) % kBuffers;
                unpack(at, step_bytes, unpacked[buffer]);
                add_products<kHasLower>(values, x.stride, unpacked[buffer]);
            }
            sums.take(kHasLower);
            const __m512 scale[kVectors] = {widen_low(scales), widen_high(scales)};
            for (int64_t r = 0; r < rows; ++r) {
                const __m512i offset = _mm512_set1_epi32(offsets[(row + r) * groups + g]);
                RS_UNROLL for (int v = 0; v < kVectors; ++v) {
                    float* total = totals + r * kBlockOutputs + v * kLanes;
                    const __m512i sum = _mm512_add_epi32(sums.vector(r, v), offset);
                    _mm512_store_ps(total, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale[v],
                                                           _mm512_load_ps(total)));
                }
            }
        }
        for (int64_t r = 0; r < rows; ++r) {
            const __m512 scale = _mm512_set1_ps(x.scales[row + r]);
            out.store<1>(row + r, block, [&](int, int v) {
                const float* total = totals + r * kBlockOutputs + v * kLanes;
                return _mm512_mul_ps(_mm512_load_ps(total), scale);
            });
        }
    }

  private:
    // Tiles are read from a buffer while the next steps are unpacked into others.
    static constexpr int kBuffers = 4;

    // Int4 weights as add_products takes them.
    static void unpack(const uint8_t* packed, int64_t bytes, uint8_t* out) {
        const __m512i nibble = _mm512_set1_epi8(15);
        for (const uint8_t* end = packed + bytes; packed < end; packed += kStep, out += 2 * kStep) {
            RS_UNROLL for (int v = 0; v < kVectors; ++v) {
                const __m512i pairs = _mm512_load_si512(packed + v * kLine);
                const __m512i high = _mm512_and_si512(_mm512_srli_epi16(pairs, 4), nibble);
                _mm512_store_si512(out + v * kLine, _mm512_and_si512(pairs, nibble));
                _mm512_store_si512(out + kStep + v * kLine, high);
            }
        }
        asm volatile("" ::: "memory");  // Reading a tile is not known to read memory.
    }
#endif
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
#ifdef RS_AMX
    if (rows >= rs::kAmxRows && rs::has_amx()) {
        rs::run_passes(kernel, rows, rs::ceil_div(outputs, rs::kBlockOutputs), threads);
        return;
    }
#endif
    rs::run_linear(kernel, rows, outputs, threads);
}

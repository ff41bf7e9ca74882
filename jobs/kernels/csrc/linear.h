// What the products of linear layers share: y[n, o] = sum_i x[n, i] * w[o, i], then bias, then y.
//
// Outputs are computed in blocks of 32, two vectors of 16 lanes, one lane an output. A block's
// weights lie in memory in the order in which they are read, inputs outermost, so that one row
// streams them from memory once, at its full rate. Outputs are padded to whole blocks with weights
// of zero.
//
// A tile is a few rows of one block, kept in registers from the first input to the last. Every
// sum is made in one lane, inputs in order, whatever the tile: a row's result is bitwise the same
// beside any other rows and with any number of threads.
#pragma once

#include <array>
#include <utility>

#include "products.h"
#include "vector.h"

// Full unrolling keeps the tile in registers: without it GCC leaves the arrays on the stack.
#define RS_UNROLL _Pragma("GCC unroll 16")

namespace rs {

constexpr int64_t kLanes = 16;
constexpr int kVectors = 2;  // vectors of a block
constexpr int64_t kBlockOutputs = kLanes * kVectors;
constexpr int64_t kLine = 64;           // bytes of a cache line
constexpr int64_t kStep = 2 * kLine;    // bytes of a block's weights that one step reads
constexpr int64_t kReach = 8192;        // how far ahead of a single pass weights are asked for

// Where results go: row n of y begins at y + n * stride.
struct Output {
    float* y;
    int64_t stride;
    int64_t outputs;
    const float* bias;  // null: none
    Mode mode;

    // Blocks of gates, before the blocks that they gate; 0 for none.
    int64_t gates() const { return mode == Mode::kGate ? outputs / kBlockOutputs / 2 : 0; }
    bool is_gated(int64_t block) const { return mode == Mode::kGate && block >= gates(); }

    float* target(int64_t row, int64_t block) const {
        const int64_t place = is_gated(block) ? block - gates() : block;
        return y + row * stride + place * kBlockOutputs;
    }

    // Store R rows of a block: value(r, v) is vector v of row r.
    template <int R, class Value>
    void store(int64_t row, int64_t block, const Value& value) const {
        if (bias || (block + 1) * kBlockOutputs > outputs) {
            RS_UNROLL for (int v = 0; v < kVectors; ++v) {
                RS_UNROLL for (int r = 0; r < R; ++r) store_part(row + r, block, v, value(r, v));
            }
        } else if (mode == Mode::kAdd) {
            write<R>(row, block, value, [](const float* old, __m512 y) {
                return _mm512_add_ps(_mm512_loadu_ps(old), y);
            });
        } else if (is_gated(block)) {
            write<R>(row, block, value, [](const float* old, __m512 y) {
                return gated(_mm512_loadu_ps(old), y);
            });
        } else {
            write<R>(row, block, value, [](const float*, __m512 y) { return y; });
        }
    }

  private:
    // The usual case: a whole block without bias, so that nothing is decided in the loop.
    template <int R, class Value, class Combine>
    void write(int64_t row, int64_t block, const Value& value, const Combine& combine) const {
        float* lane = target(row, block);
        RS_UNROLL for (int r = 0; r < R; ++r, lane += stride) {
            RS_UNROLL for (int v = 0; v < kVectors; ++v) {
                float* at = lane + v * kLanes;
                _mm512_storeu_ps(at, combine(at, value(r, v)));
            }
        }
    }

    void store_part(int64_t row, int64_t block, int vector, __m512 value) const {
        const int64_t first = block * kBlockOutputs + vector * kLanes;
        const __mmask16 mask = first_lanes(outputs - first);
        if (!mask) return;
        float* lane = target(row, block) + vector * kLanes;
        if (bias) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(mask, bias + first));
        if (mode == Mode::kAdd) {
            value = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, lane), value);
        } else if (is_gated(block)) {
            value = gated(_mm512_maskz_loadu_ps(mask, lane), value);
        }
        _mm512_mask_storeu_ps(lane, mask, value);
    }
};

// Fetches weights while others are multiplied: a tile calls step() once for every kStep bytes that
// it reads. The hardware's own prefetching does not reach far enough ahead of one pass, and stops
// when a block is read again for more rows, so that the next block would begin with a wait. They go
// to the second cache: the first holds the block that is still read.
struct Prefetch {
    const char* at;
    int64_t second;
    int64_t advance;

    void step() {
        _mm_prefetch(at, _MM_HINT_T1);
        _mm_prefetch(at + second, _MM_HINT_T1);
        at += advance;
    }
};

// For the passes that fetch nothing.
struct NoPrefetch {
    void step() {}
};

// Two passes over a block fetch the next one, a line a step each, which is as fast as memory
// answers; a single pass fetches what it will read itself.
constexpr int64_t kFetchingPasses = 2;

// The part of the next block that one of `passes` over this block fetches.
inline Prefetch prefetch_for(const uint8_t* weights, int64_t block_bytes, int64_t pass,
                             int64_t passes) {
    const char* here = reinterpret_cast<const char*>(weights);
    if (passes == 1) return {here + std::min(block_bytes, kReach), kLine, kStep};
    return {here + block_bytes + pass * (block_bytes / kFetchingPasses), 0, kLine};
}

// Call compute(block) for all blocks, for a block right behind the one that gates it.
template <class Compute>
void run_blocks(const Output& out, int64_t blocks, int threads, const Compute& compute) {
    const int64_t gates = out.gates();
    parallel_ranges(gates ? gates : blocks, threads, [&](int64_t block) {
        compute(block);
        if (gates) compute(block + gates);
    });
}

// Compute all rows of all blocks. Kernel has
// `kMaxRows`, `out`, `weights(block)`, `block_bytes` and `tile<rows>(row, block, fetch)`.
template <class Kernel, size_t... Rows>
void run_tiles(const Kernel& kernel, int64_t rows, int64_t blocks, int threads,
               std::index_sequence<Rows...>) {
    static constexpr std::array kFetching{
        &Kernel::template tile<static_cast<int>(Rows) + 1, Prefetch>...};
    static constexpr std::array kPlain{
        &Kernel::template tile<static_cast<int>(Rows) + 1, NoPrefetch>...};
    const int64_t passes = ceil_div(rows, sizeof...(Rows));
    const auto compute = [&](int64_t block) {
        for (int64_t pass = 0; pass < passes; ++pass) {
            const int64_t first = rows * pass / passes, last = rows * (pass + 1) / passes;
            if (pass < kFetchingPasses) {
                const Prefetch fetch =
                    prefetch_for(kernel.weights(block), kernel.block_bytes, pass, passes);
                (kernel.*kFetching[last - first - 1])(first, block, fetch);
            } else {
                (kernel.*kPlain[last - first - 1])(first, block, NoPrefetch{});
            }
        }
    };
    run_blocks(kernel.out, blocks, threads, compute);
}

template <class Kernel>
void run_linear(const Kernel& kernel, int64_t rows, int64_t outputs, int threads) {
    run_tiles(kernel, rows, ceil_div(outputs, kBlockOutputs), threads,
              std::make_index_sequence<Kernel::kMaxRows>{});
}

// bfloat16 values in pairs: lane n holds value n of one vector in its low half, of another in its
// high half. Widening is exact.
inline __m512 widen_low(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
inline __m512 widen_high(__m512i pairs) {
    return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(0xFFFF0000)));
}

// The same 4 bytes in every lane.
inline __m512i broadcast4(const int8_t* bytes) {
    int32_t value;
    __builtin_memcpy(&value, bytes, sizeof value);
    return _mm512_set1_epi32(value);
}

// Reads R rows that lie `stride` bytes apart, 4 bytes of each at a time. One pointer serves three
// rows, at none, one and two strides, which addresses express for free. The compiler must not know
// how the pointers are related: it would keep one, and the rows' distances from it in more
// registers than there are.
template <int R>
class RowReader {
  public:
    RowReader(const void* rows, int64_t stride) : stride_(stride) {
        RS_UNROLL for (int i = 0; i < kPointers; ++i) {
            at_[i] = static_cast<const int8_t*>(rows) + i * kShared * stride;
        }
    }

    // 4 bytes of row r in every lane: the next ones, or those `ahead` of them.
    __m512i broadcast(int r, int64_t ahead = 0) const {
        return broadcast4(at_[r / kShared] + r % kShared * stride_ + ahead);
    }

    void advance(int64_t bytes = 4) {
        RS_UNROLL for (int i = 0; i < kPointers; ++i) {
            at_[i] += bytes;
            if constexpr (kPointers > 1) asm("" : "+r"(at_[i]));
        }
    }

  private:
    static constexpr int kShared = 3;
    static constexpr int kPointers = (R + kShared - 1) / kShared;

    const int8_t* at_[kPointers];
    int64_t stride_;
};

}  // namespace rs

// What the products of linear layers share: y[n, o] = sum_i x[n, i] * w[o, i], then bias, then y.
//
// Outputs are computed in blocks of two vectors, one lane an output. A block's weights lie in memory
// in the order in which they are read, inputs outermost, so that one row streams them from memory
// once, at its full rate. Outputs are padded to whole blocks with weights of zero.
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

constexpr int kVectors = 2;  // vectors of a block
constexpr int64_t kBlockOutputs = kLanes * kVectors;
constexpr int64_t kLine = 64;                       // bytes of a cache line
constexpr int64_t kStep = kVectors * kVectorBytes;  // bytes of a block's weights that a step reads
constexpr int64_t kStepLines = kStep / kLine;
constexpr int64_t kReach = 8192;  // how far ahead of a single pass weights are asked for

// Int8 weights: how many inputs of an output lie together, and what is added to each.
#ifdef RS_VNNI
constexpr int64_t kInt8Inputs = 4, kInt8Offset = 128;
#else
constexpr int64_t kInt8Inputs = 2, kInt8Offset = 0;
#endif

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
            Floats values[R][kVectors];
            RS_UNROLL for (int r = 0; r < R; ++r) {
                RS_UNROLL for (int v = 0; v < kVectors; ++v) values[r][v] = value(r, v);
            }
            store_parts(row, R, block, values);
        } else if (mode == Mode::kAdd) {
            write<R>(row, block, value, [](const float* old, Floats y) { return load(old) + y; });
        } else if (is_gated(block)) {
            write<R>(row, block, value,
                     [](const float* old, Floats y) { return gated(load(old), y); });
        } else {
            write<R>(row, block, value, [](const float*, Floats y) { return y; });
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
                rs::store(at, combine(at, value(r, v)));
            }
        }
    }

    // Any other case; apart, so that tiles stay small.
    __attribute__((noinline)) void store_parts(int64_t row, int rows, int64_t block,
                                               const Floats (*values)[kVectors]) const {
        for (int v = 0; v < kVectors; ++v) {
            const int64_t first = block * kBlockOutputs + v * kLanes, count = outputs - first;
            if (count <= 0) return;
            float* lane = target(row, block) + v * kLanes;
            for (int r = 0; r < rows; ++r, lane += stride) {
                Floats value = values[r][v];
                if (bias) value = value + load_some(bias + first, count);
                if (mode == Mode::kAdd) {
                    value = load_some(lane, count) + value;
                } else if (is_gated(block)) {
                    value = gated(load_some(lane, count), value);
                }
                store_some(lane, value, count);
            }
        }
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
        if constexpr (kStepLines > 1) _mm_prefetch(at + second, _MM_HINT_T1);
        at += advance;
    }
};

// For the passes that fetch nothing.
struct NoPrefetch {
    void step() {}
};

// The first passes over a block fetch the next one, a line a step each, which is as fast as memory
// answers; a single pass fetches what it will read itself.
constexpr int64_t kFetchingPasses = kStepLines;

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
inline Floats widen_low(Ints pairs) { return as_floats(shift_left<16>(pairs)); }
inline Floats widen_high(Ints pairs) {
    return as_floats(bits_of(pairs, all(static_cast<int32_t>(0xFFFF0000))));
}

// The same 4 bytes in every lane.
inline Ints broadcast4(const int8_t* bytes) {
    int32_t value;
    __builtin_memcpy(&value, bytes, sizeof value);
    return all(value);
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
    Ints broadcast(int r, int64_t ahead = 0) const {
        return broadcast4(at_[r / kShared] + r % kShared * stride_ + ahead);
    }

    void advance(int64_t bytes = 4) {
        RS_UNROLL for (int i = 0; i < kPointers; ++i) {
            const int8_t* next = at_[i] + bytes;
            if constexpr (kPointers > 1) asm("" : "+r"(next));
            at_[i] = next;
        }
    }

  private:
    static constexpr int kShared = 3;
    static constexpr int kPointers = (R + kShared - 1) / kShared;

    const int8_t* at_[kPointers];
    int64_t stride_;
};

}  // namespace rs

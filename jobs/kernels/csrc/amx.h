// Products of int8 rows on the tile registers of AMX, where the CPU has them.
//
// A tile register holds 16 rows of 64 bytes. One instruction adds to 16 x 16 sums the products of 16
// rows of 64 inputs, signed, and 64 inputs of 16 outputs, unsigned, which lie in memory as they do
// for vpdpbusd: 4 inputs of 16 outputs a line. So both instructions read the same packed weights, and
// as sums of integers are exact, both give the same bits.
//
// A pass is up to 32 rows on one block of 32 outputs: four tiles of sums, two of rows, two of weights.
#pragma once

#include "linear.h"
#include "quantize.h"

#if defined(RS_VNNI) && defined(__AMX_INT8__) && defined(__linux__)
#define RS_AMX 1
#endif

namespace rs {

// Whether this process may use the tile registers. RAYSMITH_AMX=0 says no.
bool has_amx();

#ifdef RS_AMX

constexpr int64_t kTileRows = 16;
constexpr int64_t kPassRows = 2 * kTileRows;
constexpr int64_t kTileInputs = 64;  // of a step, at most
constexpr int64_t kTileStep = kTileInputs * kBlockOutputs;  // bytes of their weights

// The tile registers of this thread, set up for passes of so many rows and steps of so many inputs.
// Tiles 0-3 are sums, 4 and 5 rows, 6 and 7 weights.
class TileRegisters {
  public:
    TileRegisters(int64_t rows, int64_t inputs) {
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {};
            uint8_t rows[16] = {};
        } config;
        const auto upper = static_cast<uint8_t>(std::min(rows, kTileRows));
        const auto lower = static_cast<uint8_t>(rows - upper);
        const auto fours = static_cast<uint8_t>(inputs / 4);
        const uint8_t tile_rows[] = {upper, upper, lower, lower, upper, lower, fours, fours};
        for (int tile = 0; tile < 8; ++tile) {
            const bool holds_inputs = tile == 4 || tile == 5;
            config.rows[tile] = tile_rows[tile];
            config.row_bytes[tile] = !tile_rows[tile] ? 0 : holds_inputs ? inputs : kLine;
        }
        asm volatile("" ::"r"(&config) : "memory");  // Reading all of it is not known either.
        _tile_loadconfig(&config);
    }
    ~TileRegisters() { _tile_release(); }
    TileRegisters(const TileRegisters&) = delete;
    TileRegisters& operator=(const TileRegisters&) = delete;
};

inline void clear_sums(bool has_lower) {
    _tile_zero(0);
    _tile_zero(1);
    if (!has_lower) return;
    _tile_zero(2);
    _tile_zero(3);
}

// Add a step: inputs at `values` of rows that lie `stride` bytes apart, times `weights` [inputs / 4,
// 32, 4].
template <bool kHasLower>
inline void add_products(const int8_t* values, int64_t stride, const uint8_t* weights) {
    _tile_loadd(6, weights, kStep);
    _tile_loadd(4, values, stride);
    _tile_dpbsud(0, 4, 6);
    _tile_loadd(7, weights + kLine, kStep);
    _tile_dpbsud(1, 4, 7);
    if constexpr (kHasLower) {
        _tile_loadd(5, values + kTileRows * stride, stride);
        _tile_dpbsud(2, 5, 6);
        _tile_dpbsud(3, 5, 7);
    }
}

// The sums of a pass in memory, [32 rows, 32 outputs].
struct PassSums {
    alignas(64) int32_t values[kPassRows * kBlockOutputs];

    void take(bool has_lower) {
        constexpr int64_t kStride = kBlockOutputs * sizeof(int32_t);
        _tile_stored(0, values, kStride);
        _tile_stored(1, values + kLanes, kStride);
        if (!has_lower) return;
        int32_t* lower = values + kTileRows * kBlockOutputs;
        _tile_stored(2, lower, kStride);
        _tile_stored(3, lower + kLanes, kStride);
    }

    __m512i vector(int64_t row, int v) const {
        return _mm512_load_si512(values + row * kBlockOutputs + v * kLanes);
    }
};

// Fetches weights into the second cache while others are multiplied: a pass calls step() once for
// every `bytes` that it reads of them.
class TilePrefetch {
  public:
    // The part of the next block that one of `passes` over this block fetches.
    TilePrefetch(const uint8_t* weights, int64_t block_bytes, int64_t pass, int64_t passes) {
        const char* here = reinterpret_cast<const char*>(weights);
        if (passes == 1) {
            at_ = here + std::min(block_bytes, kTileReach), share_ = 1;
            return;
        }
        const int64_t sharers = std::min(passes, kSharers);
        share_ = pass < sharers ? sharers : kNothing;
        at_ = here + block_bytes + pass * (block_bytes / sharers);
    }

    void step(int64_t bytes) {
        for (const char* end = at_ + bytes / share_; at_ < end; at_ += kLine) {
            _mm_prefetch(at_, _MM_HINT_T1);
        }
    }

  private:
    static constexpr int64_t kTileReach = 4096;
    static constexpr int64_t kSharers = 4;

    static constexpr int64_t kNothing = INT64_MAX;

    const char* at_;
    int64_t share_;  // of a step's bytes, this pass fetches one in so many
};

// Compute all rows of all blocks. Kernel has `out`,
// `weights(block)`, `block_bytes`, `step_inputs` and `pass<has_lower>(row, rows, block, prefetch)`.
template <class Kernel>
void run_passes(const Kernel& kernel, int64_t rows, int64_t blocks, int threads) {
    const int64_t whole = rows / kPassRows, rest = rows % kPassRows;
    const int64_t passes = whole + (rest > 0);
    const auto compute = [&](int64_t block) {
        const auto prefetch = [&](int64_t pass) {
            return TilePrefetch(kernel.weights(block), kernel.block_bytes, pass, passes);
        };
        if (whole) {
            const TileRegisters registers(kPassRows, kernel.step_inputs());
            for (int64_t pass = 0; pass < whole; ++pass) {
                kernel.template pass<true>(pass * kPassRows, kPassRows, block, prefetch(pass));
            }
        }
        if (!rest) return;
        const TileRegisters registers(rest, kernel.step_inputs());
        if (rest > kTileRows) {
            kernel.template pass<true>(whole * kPassRows, rest, block, prefetch(whole));
        } else {
            kernel.template pass<false>(whole * kPassRows, rest, block, prefetch(whole));
        }
    };
    run_blocks(kernel.out, blocks, threads, compute);
}

#endif

}  // namespace rs

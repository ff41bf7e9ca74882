// The inner loops of attention: scores of a few queries on a chunk of keys, and sums of its values.
//
// Sums are held in registers, one lane a key or a feature, and every lane adds in order: a row's
// result is bitwise the same beside any other rows.
#pragma once

#include <type_traits>

#include "vector.h"

namespace rs {

constexpr int64_t kMaxSlots = 512;  // of a block, or of the blocks of a chunk
constexpr int64_t kRowBlock = kRegisters > 16 ? 8 : 4;  // rows whose sums registers hold
constexpr int64_t kMaxVectors = kMaxSlots / kLanes;

// Keys that are taken together: vectors of kLanes slots, and the blocks whose slots they are. Slots
// behind a block's end are padding, which nobody sees.
template <class T>
struct Chunk {
    int64_t num_vectors, num_blocks;
    const T* keys[kMaxVectors];
    const T* values[kMaxVectors];  // of the same tokens, to be fetched early
    const float* key_scales[kMaxVectors];
    const float* value_scales[kMaxVectors];
    int64_t position[kMaxVectors];  // of the vector's first slot
    int64_t num_slots[kMaxVectors];
    const T* block_keys[kMaxVectors];
    const T* block_values[kMaxVectors];
    int64_t first_slot[kMaxVectors], last_slot[kMaxVectors];  // seen by any row, in each block

    // Lanes of vector v that hold positions [first, last].
    Lanes lanes(int64_t v, int64_t first, int64_t last) const {
        const int64_t stop = std::min(num_slots[v], last + 1 - position[v]);
        return without(first_lanes(stop), first_lanes(first - position[v]));
    }
};

// A tile of few rows waits for memory rather than for sums. So with kFetch each step asks for what
// the next one reads: scoring for the values of the same tokens, mixing for the next chunk's keys, as
// many as it reads values itself.

// scores[r][0..kLanes NV) = q[r] . keys, for R rows and vectors [v, v + NV) of a chunk. Each vector
// has its own address: the next one may lie in another block.
template <class T, int R, int NV, bool kFetch>
inline void score_block(const float* q, int64_t dim, const Chunk<T>& chunk, int64_t v0,
                        int64_t slots, float* scores, int64_t score_stride) {
    const T* keys[NV];
    const T* values[NV];
    Floats sums[R][NV];
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) {
        keys[v] = chunk.keys[v0 + v];
        values[v] = chunk.values[v0 + v];
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v) sums[r][v] = zeros();
    }
    constexpr int kStepsPerLine = 64 / (kLanes * sizeof(T));  // of values, a vector a step
    for (int64_t d = 0; d < dim; ++d) {
        Floats key[NV];
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v) {
            if (kFetch && d % kStepsPerLine == 0) _mm_prefetch(values[v] + d * kLanes, _MM_HINT_T1);
            key[v] = load(keys[v] + d * slots);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const Floats query = all(q[r * dim + d]);
#pragma GCC unroll 2
            for (int v = 0; v < NV; ++v) sums[r][v] = multiply_add(query, key[v], sums[r][v]);
        }
    }
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) {
        Floats scale = zeros();
        if constexpr (std::is_same_v<T, int8_t>) scale = load(chunk.key_scales[v0 + v]);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            Floats score = sums[r][v];
            if constexpr (std::is_same_v<T, int8_t>) score = score * scale;
            store(scores + r * score_stride + kLanes * v, score);
        }
    }
}

// o[r][0..kLanes NV) += weights[r] . values, over the visible slots of each block of the chunk. A
// block's keys take as much memory as its values.
template <class T, int R, int NV, bool kFetch>
inline void mix_block(const float* weights, int64_t weight_stride, const Chunk<T>& chunk,
                      const Chunk<T>& next, int64_t column, int64_t slots, int64_t padded_dim,
                      float* o) {
    Floats sums[R][NV];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v) sums[r][v] = load(o + r * padded_dim + kLanes * v);
    }
    for (int64_t b = 0; b < chunk.num_blocks; ++b) {
        const T* values = chunk.block_values[b] + column;
        const T* next_keys = next.block_keys[std::min(b, next.num_blocks - 1)] + column;
        for (int64_t s = chunk.first_slot[b]; s < chunk.last_slot[b]; ++s) {
            const T* row = values + s * padded_dim;
            if constexpr (kFetch) {
#pragma GCC unroll 2
                for (int v = 0; v < NV; ++v) {
                    if (kLanes * v * sizeof(T) % 64) continue;  // In the line of the vector before.
                    _mm_prefetch(next_keys + s * padded_dim + kLanes * v, _MM_HINT_T1);
                }
            }
            Floats value[NV];
#pragma GCC unroll 2
            for (int v = 0; v < NV; ++v) value[v] = load(row + kLanes * v);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                const Floats weight = all(weights[r * weight_stride + b * slots + s]);
#pragma GCC unroll 2
                for (int v = 0; v < NV; ++v) {
                    sums[r][v] = multiply_add(weight, value[v], sums[r][v]);
                }
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v) store(o + r * padded_dim + kLanes * v, sums[r][v]);
    }
}

// Call f with the number of rows, kRowBlock at most, as a constant.
template <int kRows = kRowBlock, class F>
inline void with_rows(int64_t rows, const F& f) {
    if constexpr (kRows > 1) {
        if (rows < kRows) return with_rows<kRows - 1>(rows, f);
    }
    f(std::integral_constant<int, kRows>{});
}

}  // namespace rs

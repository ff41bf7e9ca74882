// What paged attention is given: the pool of blocks, and the pass that reads and writes it.
//
// keys    [layer, block, kv head, D, slots]   a feature of all tokens of a block lies together, so
//                                             scores are computed without a reduction
// values  [layer, block, kv head, slots, padded D]
// scales  float [2, layer, block, kv head, slots], keys' then values'; int8 only
//
// slots is block_size, and padded D is D, rounded up to 16; what is padded is zero and stays so.
#pragma once

#include "common.h"

namespace rs {

enum class CacheType : int64_t { kFloat32 = 0, kBfloat16 = 1, kInt8 = 2 };

// One per cache; mirrored in native_ops.py.
struct Pool {
    void* keys;
    void* values;
    float* scales;
    CacheType type;
    int64_t num_blocks, block_size, num_layers, num_heads, num_kv_heads, head_dim;
    int64_t window;  // tokens that are seen, the query's own included; 0 for all

    int64_t slots() const { return round_up(block_size, 16); }
    int64_t padded_dim() const { return round_up(head_dim, 16); }
    int64_t q_width() const { return num_heads * head_dim; }
    int64_t k_width() const { return num_kv_heads * head_dim; }
    int64_t group() const { return num_heads / num_kv_heads; }
    int64_t cell(int64_t layer, int64_t block, int64_t kv_head) const {
        return (layer * num_blocks + block) * num_kv_heads + kv_head;
    }
    int64_t num_cells() const { return num_layers * num_blocks * num_kv_heads; }
};

// Tokens [start, start + length) of one sequence; its blocks begin at `table` in Pass::tables.
struct Span {
    int64_t table, start, length;
    int64_t first_row;   // where its tokens begin in the pass
    int64_t first_tile;  // tiles of query rows of all spans before it
};

// Of one token, [D / 2] each; null where queries and keys are rotated already.
struct Angles {
    const float *cos, *sin;
};

// One per forward pass; mirrored in native_ops.py. spans[num_spans] holds the totals.
struct Pass {
    const int32_t* tables;
    const Span* spans;
    int64_t num_spans;
    int64_t num_key_tokens;  // tokens that all tiles read, for choosing the number of threads
    const float *cos, *sin;  // [T, D / 2], or null; see Angles

    int64_t num_rows() const { return spans[num_spans].first_row; }
    int64_t num_tiles() const { return spans[num_spans].first_tile; }

    // The last span for which of(span) <= number; `of` rises.
    template <class Of>
    const Span* find_span(int64_t number, const Of& of) const {
        int64_t low = 0, high = num_spans;
        while (high - low > 1) {
            const int64_t middle = (low + high) / 2;
            (of(spans[middle]) <= number ? low : high) = middle;
        }
        return spans + low;
    }

    Angles angles(int64_t row, int64_t head_dim) const {
        if (!cos) return {nullptr, nullptr};
        return {cos + row * (head_dim / 2), sin + row * (head_dim / 2)};
    }
};

// One per layer and call. Rows of a token lie `stride` floats apart, heads behind one another.
struct Inputs {
    const float *q, *k, *v;
    int64_t q_stride, k_stride, v_stride;
    const float *q_norm, *k_norm;  // weights [D] of RMSNorm on each head; null for none
    float eps;
};

// Write the pass's keys and values into `layer`, then give what every query attends to: out
// [T, H, D]. Queries and keys are normalised and rotated on the way where the arguments say so.
void attend_paged(const Pool& pool, const Pass& pass, const Inputs& in, int64_t layer, float* out,
                  int threads);

}  // namespace rs

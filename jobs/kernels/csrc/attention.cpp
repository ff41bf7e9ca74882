// Attention of a ragged batch over a pool of blocks: decoding and prefilling spans in one call.
//
// First every token's key and value are written, then every query is computed. A task is a tile: up
// to 64 rows (a row is one query head of one token) of one span that share a key head. Keys are
// taken in chunks at fixed places of the sequence, with a running maximum and sum (Milakov and
// Gimelshein 2018). Every row is computed on its own, key after key, in an order that depends on
// its position alone; what it may not see adds exact zeros. So a row's result does not depend on
// tiles, spans, block numbers or threads.
#include "attention.h"

#include <cmath>
#include <type_traits>

#include "attention_chunk.h"
#include "attention_rows.h"

namespace rs {
namespace {

constexpr int64_t kTileRows = 64;  // native_ops.py counts tiles with the same number
constexpr int64_t kChunkKeys = 256;
constexpr int64_t kWriteRows = 8;       // tokens written by one task
constexpr float kLowest = -1e30f;       // finite, so that differences of it are no NaN
constexpr int64_t kParallelKeys = 192;  // fewer keys are read sooner than a thread is woken

struct Tile {
    int64_t kv_head;
    int64_t num_rows, first_row;  // first_row: of the span, token * group + head of group
};

struct Scratch {
    alignas(64) float q[kTileRows * kMaxDim];
    alignas(64) float o[kTileRows * kMaxDim];
    alignas(64) float scores[kTileRows * (kMaxSlots + 16)];
    float largest[kTileRows];
    float sum[kTileRows];
};

template <class T>
class Layer {
  public:
    Layer(const Pool& pool, const Pass& pass, const Inputs& in, int64_t layer, float* out)
        : pool_(pool), pass_(pass), in_(in), layer_(layer), out_(out),
          dim_(pool.head_dim), slots_(pool.slots()), padded_dim_(pool.padded_dim()),
          blocks_per_chunk_(std::max<int64_t>(1, kChunkKeys / pool.slots())),
          // Sixteen more than is used: rows a power of two apart would share few cache sets.
          score_stride_(blocks_per_chunk_ * pool.slots() + 16) {}

    void run(int threads) const {
        const int64_t rows = pass_.spans[pass_.num_spans].first_row;
        const int64_t tiles = pass_.spans[pass_.num_spans].first_tile;
        const int64_t num_writes = ceil_div(rows, kWriteRows);
        const int64_t num_tiles = tiles * pool_.num_kv_heads;
        if (pass_.num_key_tokens * pool_.num_kv_heads < kParallelKeys) threads = 1;
        if (threads <= 1) {
            for (int64_t task = 0; task < num_writes; ++task) write(task);
            for (int64_t task = 0; task < num_tiles; ++task) attend(task);
            return;
        }
        std::atomic<int64_t> next_write{0}, next_tile{0};
#pragma omp parallel num_threads(threads)
        {
            for (int64_t task; (task = next_write.fetch_add(1)) < num_writes;) write(task);
#pragma omp barrier
            // From the last: a span's late tiles have the most keys, and long tasks go first.
            for (int64_t task; (task = next_tile.fetch_add(1)) < num_tiles;) {
                attend(num_tiles - 1 - task);
            }
        }
    }

  private:
    const T* keys(int64_t block, int64_t kv_head) const {
        const int64_t cell = pool_.cell(layer_, block, kv_head);
        return static_cast<const T*>(pool_.keys) + cell * dim_ * slots_;
    }
    const T* values(int64_t block, int64_t kv_head) const {
        const int64_t cell = pool_.cell(layer_, block, kv_head);
        return static_cast<const T*>(pool_.values) + cell * slots_ * padded_dim_;
    }
    float* key_scales(int64_t block, int64_t kv_head) const {
        return pool_.scales + pool_.cell(layer_, block, kv_head) * slots_;
    }
    float* value_scales(int64_t block, int64_t kv_head) const {
        return key_scales(block, kv_head) + pool_.num_cells() * slots_;
    }

    // Write keys and values of a few tokens.
    void write(int64_t task) const {
        const int64_t first = task * kWriteRows;
        const int64_t last =
            std::min(first + kWriteRows, pass_.spans[pass_.num_spans].first_row);
        int64_t low = 0, high = pass_.num_spans;  // the span of row `first` is in [low, high)
        while (high - low > 1) {
            const int64_t middle = (low + high) / 2;
            (pass_.spans[middle].first_row <= first ? low : high) = middle;
        }
        const Span* span = pass_.spans + low;
        for (int64_t row = first; row < last; ++row) {
            while (row >= span[1].first_row) ++span;
            const int64_t position = span->start + row - span->first_row;
            const int64_t block =
                pass_.tables[span->table + position / pool_.block_size];
            write_token(row, block, position % pool_.block_size);
        }
    }

    void write_token(int64_t row, int64_t block, int64_t slot) const {
        const float* cos = pass_.cos ? pass_.cos + row * (dim_ / 2) : nullptr;
        const float* sin = pass_.cos ? pass_.sin + row * (dim_ / 2) : nullptr;
        alignas(64) float head[kMaxDim];
        for (int64_t kv_head = 0; kv_head < pool_.num_kv_heads; ++kv_head) {
            const float* k = in_.k + row * in_.k_stride + kv_head * dim_;
            const float* v = in_.v + row * in_.v_stride + kv_head * dim_;
            prepare_head(k, in_.k_norm, in_.eps, cos, sin, dim_, 1.0f, head);
            T* key = const_cast<T*>(keys(block, kv_head)) + slot;
            T* value = const_cast<T*>(values(block, kv_head)) + slot * padded_dim_;
            if constexpr (std::is_same_v<T, int8_t>) {
                key_scales(block, kv_head)[slot] = store(key, slots_, head, dim_);
                value_scales(block, kv_head)[slot] = store(value, 1, v, dim_);
            } else {
                store(key, slots_, head, dim_);
                store(value, 1, v, dim_);
            }
        }
    }

    // Compute one tile.
    void attend(int64_t task) const {
        const int64_t number = task / pool_.num_kv_heads;
        int64_t low = 0, high = pass_.num_spans;
        while (high - low > 1) {
            const int64_t middle = (low + high) / 2;
            (pass_.spans[middle].first_tile <= number ? low : high) = middle;
        }
        const Span& span = pass_.spans[low];
        Tile tile;
        tile.kv_head = task % pool_.num_kv_heads;
        tile.first_row = (number - span.first_tile) * kTileRows;
        tile.num_rows = std::min(kTileRows, span.length * pool_.group() - tile.first_row);
        Scratch scratch;
        begin(tile, span, scratch);
        const int64_t last = position(tile, span, tile.num_rows - 1);
        const int64_t first = first_visible(position(tile, span, 0));
        const int64_t chunk_keys = blocks_per_chunk_ * pool_.block_size;
        for (int64_t chunk = first / chunk_keys; chunk <= last / chunk_keys; ++chunk) {
            attend_chunk(tile, span, chunk * blocks_per_chunk_, first, last, scratch);
        }
        finish(tile, span, scratch);
    }

    int64_t position(const Tile& tile, const Span& span, int64_t r) const {
        return span.start + (tile.first_row + r) / pool_.group();
    }
    int64_t first_visible(int64_t position) const {
        return pool_.window ? std::max<int64_t>(0, position - pool_.window + 1) : 0;
    }

    void begin(const Tile& tile, const Span& span, Scratch& scratch) const {
        // Scores in powers of two: one multiplication less for each.
        const float factor = kLog2E / std::sqrt(static_cast<float>(dim_));
        const int64_t group = pool_.group();
        for (int64_t r = 0; r < tile.num_rows; ++r) {
            const int64_t token = (tile.first_row + r) / group;
            const int64_t head = tile.kv_head * group + (tile.first_row + r) % group;
            const int64_t row = span.first_row + token;
            const float* cos = pass_.cos ? pass_.cos + row * (dim_ / 2) : nullptr;
            const float* sin = pass_.cos ? pass_.sin + row * (dim_ / 2) : nullptr;
            const float* q = in_.q + row * in_.q_stride + head * dim_;
            prepare_head(q, in_.q_norm, in_.eps, cos, sin, dim_, factor, scratch.q + r * dim_);
            scratch.largest[r] = kLowest;
            scratch.sum[r] = 0.0f;
        }
        std::fill_n(scratch.o, tile.num_rows * padded_dim_, 0.0f);
    }

    // Add keys [first_block, first_block + blocks_per_chunk) of the sequence, as far as positions
    // [first, last] reach, to all rows of the tile.
    void attend_chunk(const Tile& tile, const Span& span, int64_t first_block, int64_t first,
                      int64_t last, Scratch& scratch) const {
        Chunk<T> chunk;
        gather(tile, span, first_block, first, last, chunk);
        if (tile.num_rows <= kRowBlock) {
            score<true>(tile, chunk, scratch);
        } else {
            score<false>(tile, chunk, scratch);
        }
        for (int64_t r = 0; r < tile.num_rows; ++r) {
            weigh(r, position(tile, span, r), chunk, scratch);
        }
        for (int64_t r = 0; r < tile.num_rows; r += kRowBlock) {
            const float* weights = scratch.scores + r * score_stride_;
            with_rows(tile.num_rows - r, [&](auto rows) {
                for (int64_t d = 0; d < padded_dim_; d += 32) {
                    float* o = scratch.o + r * padded_dim_ + d;
                    if (d + 16 < padded_dim_) {
                        mix_block<T, rows, 2>(weights, score_stride_, chunk, d, slots_,
                                              padded_dim_, o);
                    } else {
                        mix_block<T, rows, 1>(weights, score_stride_, chunk, d, slots_,
                                              padded_dim_, o);
                    }
                }
            });
        }
    }

    void gather(const Tile& tile, const Span& span, int64_t first_block, int64_t first,
                int64_t last, Chunk<T>& chunk) const {
        const int32_t* table = pass_.tables + span.table;
        const int64_t begin_block = std::max(first_block, first / pool_.block_size);
        const int64_t end_block =
            std::min(first_block + blocks_per_chunk_, last / pool_.block_size + 1);
        chunk.num_blocks = end_block - begin_block;
        chunk.num_vectors = 0;
        for (int64_t b = 0; b < chunk.num_blocks; ++b) {
            const int64_t block = table[begin_block + b];
            const int64_t start = (begin_block + b) * pool_.block_size;
            const T* block_keys = keys(block, tile.kv_head);
            chunk.block_values[b] = values(block, tile.kv_head);
            chunk.first_slot[b] = std::max<int64_t>(0, first - start);
            chunk.last_slot[b] = std::min(pool_.block_size, last + 1 - start);
            for (int64_t slot = 0; slot < chunk.last_slot[b]; slot += 16) {
                const int64_t v = chunk.num_vectors++;
                chunk.keys[v] = block_keys + slot;
                chunk.values[v] = chunk.block_values[b] + slot * padded_dim_;
                chunk.position[v] = start + slot;
                chunk.num_slots[v] = pool_.block_size - slot;
                if constexpr (std::is_same_v<T, int8_t>) {
                    chunk.key_scales[v] = key_scales(block, tile.kv_head) + slot;
                    chunk.value_scales[v] = value_scales(block, tile.kv_head) + slot;
                }
            }
        }
    }

    // Scores of all rows of the tile on all keys of the chunk; keys outermost, so that they stay in
    // the first cache while the rows pass over them.
    template <bool kFetch>
    void score(const Tile& tile, const Chunk<T>& chunk, Scratch& scratch) const {
        for (int64_t v = 0; v < chunk.num_vectors; v += 2) {
            for (int64_t r = 0; r < tile.num_rows; r += kRowBlock) {
                const float* q = scratch.q + r * dim_;
                float* scores = scratch.scores + r * score_stride_ + 16 * v;
                with_rows(tile.num_rows - r, [&](auto rows) {
                    if (v + 1 < chunk.num_vectors) {
                        score_block<T, rows, 2, kFetch>(q, dim_, chunk, v, slots_, scores,
                                                        score_stride_);
                    } else {
                        score_block<T, rows, 1, kFetch>(q, dim_, chunk, v, slots_, scores,
                                                        score_stride_);
                    }
                });
            }
        }
    }

    // Turn row r's scores into weights, zero where nothing is seen, and scale what it has so far.
    void weigh(int64_t r, int64_t position, const Chunk<T>& chunk, Scratch& scratch) const {
        float* scores = scratch.scores + r * score_stride_;
        const int64_t first = first_visible(position);
        __m512 highest = _mm512_set1_ps(scratch.largest[r]);
        for (int64_t v = 0; v < chunk.num_vectors; ++v) {
            const __m512 score = _mm512_loadu_ps(scores + 16 * v);
            highest = _mm512_mask_max_ps(highest, chunk.lanes(v, first, position), highest, score);
        }
        const float largest = _mm512_reduce_max_ps(highest);
        const __m512 shift = _mm512_set1_ps(largest);
        __m512 sum = _mm512_setzero_ps();
        for (int64_t v = 0; v < chunk.num_vectors; ++v) {
            const __m512 score = _mm512_loadu_ps(scores + 16 * v);
            const __mmask16 lanes = chunk.lanes(v, first, position);
            __m512 weight = _mm512_maskz_mov_ps(lanes, exp2(_mm512_sub_ps(score, shift)));
            sum = _mm512_add_ps(sum, weight);
            if constexpr (std::is_same_v<T, int8_t>) {
                // The values' scales ride on the weights.
                const __m512 scale = _mm512_loadu_ps(chunk.value_scales[v]);
                weight = _mm512_maskz_mul_ps(lanes, weight, scale);
            }
            _mm512_storeu_ps(scores + 16 * v, weight);
        }
        const __m512 shrink =
            exp2(_mm512_sub_ps(_mm512_set1_ps(scratch.largest[r]), shift));
        scratch.largest[r] = largest;
        scratch.sum[r] =
            scratch.sum[r] * _mm512_cvtss_f32(shrink) + _mm512_reduce_add_ps(sum);
        float* o = scratch.o + r * padded_dim_;
        for (int64_t d = 0; d < padded_dim_; d += 16) {
            _mm512_storeu_ps(o + d, _mm512_mul_ps(_mm512_loadu_ps(o + d), shrink));
        }
    }

    void finish(const Tile& tile, const Span& span, const Scratch& scratch) const {
        const int64_t group = pool_.group();
        for (int64_t r = 0; r < tile.num_rows; ++r) {
            const int64_t token = span.first_row + (tile.first_row + r) / group;
            const int64_t head = tile.kv_head * group + (tile.first_row + r) % group;
            float* out = out_ + (token * pool_.num_heads + head) * dim_;
            const float* o = scratch.o + r * padded_dim_;
            const __m512 inverse = _mm512_set1_ps(1.0f / scratch.sum[r]);
            for (int64_t d = 0; d < dim_; d += 16) {
                _mm512_mask_storeu_ps(out + d, first_lanes(dim_ - d),
                                      _mm512_mul_ps(_mm512_loadu_ps(o + d), inverse));
            }
        }
    }

    const Pool& pool_;
    const Pass& pass_;
    const Inputs& in_;
    const int64_t layer_;
    float* const out_;
    const int64_t dim_, slots_, padded_dim_, blocks_per_chunk_, score_stride_;
};

}  // namespace

void attend_paged(const Pool& pool, const Pass& pass, const Inputs& in, int64_t layer, float* out,
                  int threads) {
    switch (pool.type) {
        case CacheType::kFloat32: return Layer<float>(pool, pass, in, layer, out).run(threads);
        case CacheType::kBfloat16: return Layer<Bfloat16>(pool, pass, in, layer, out).run(threads);
        case CacheType::kInt8: return Layer<int8_t>(pool, pass, in, layer, out).run(threads);
    }
}

}  // namespace rs

RS_EXPORT void rs_attend_paged(const rs::Pool* pool, const rs::Pass* pass, int64_t layer,
                               const float* q, const float* k, const float* v, int64_t q_stride,
                               int64_t k_stride, int64_t v_stride, const float* q_norm,
                               const float* k_norm, float eps, float* out, int32_t threads) {
    const rs::Inputs in{q, k, v, q_stride, k_stride, v_stride, q_norm, k_norm, eps};
    rs::attend_paged(*pool, *pass, in, layer, out, threads);
}

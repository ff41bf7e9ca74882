// What the queries of one layer attend to, tile after tile.
//
// A tile is up to 64 rows (a row is one query head of one token) of one span that share a key head.
// Keys are taken in chunks at fixed places of the sequence, with a running maximum and sum (Milakov
// and Gimelshein 2018). Every row is computed on its own, key after key, in an order that depends on
// its position alone; what it may not see adds exact zeros. So a row's result does not depend on
// tiles, spans, block numbers or threads.
#pragma once

#include <cmath>
#include <type_traits>
#include <utility>

#include "attention_cells.h"
#include "attention_chunk.h"
#include "attention_rows.h"

namespace rs {

constexpr int64_t kTileRows = 64;  // native_ops.py counts tiles with the same number
constexpr int64_t kChunkKeys = 256;
constexpr float kLowest = -1e30f;  // finite, so that differences of it are no NaN

// Tiles that are still to be computed; shared by threads.
class TileQueue {
  public:
    TileQueue(int64_t num_tiles, int threads) : left_(num_tiles), short_(2 * threads) {}

    // The last tile, or a number below 0: a span's late tiles have the most keys, and long tasks go
    // first.
    int64_t take() { return left_.fetch_sub(1, std::memory_order_relaxed) - 1; }
    bool is_long() const { return left_.load(std::memory_order_relaxed) > short_; }

  private:
    std::atomic<int64_t> left_;
    const int64_t short_;
};

template <class T>
class Attender {
  public:
    Attender(const Pool& pool, const Pass& pass, const Inputs& in, int64_t layer, float* out)
        : pool_(pool), pass_(pass), in_(in), cells_(pool, layer), out_(out),
          dim_(pool.head_dim), slots_(pool.slots()), padded_dim_(pool.padded_dim()),
          blocks_per_chunk_(std::max<int64_t>(1, kChunkKeys / pool.slots())),
          chunk_keys_(blocks_per_chunk_ * pool.block_size),
          // Sixteen more than is used: rows a power of two apart would share few cache sets.
          score_stride_(blocks_per_chunk_ * pool.slots() + 16) {}

    int64_t num_tasks() const { return pass_.num_tiles() * pool_.num_kv_heads; }

    // Compute the tiles that a queue gives. While it is long a tile is taken when the one before it
    // begins, so that its keys are on their way; the last ones go to whoever is free.
    void run(TileQueue& queue) const {
        int64_t task = queue.take();
        if (task < 0) return;
        Scratch scratch;
        Chunk<T> chunks[2];
        Chunk<T>*chunk = chunks, *next_chunk = chunks + 1;
        Tile tile = tile_of(task);
        gather(tile, first_chunk(tile), *chunk);
        while (task >= 0) {
            const bool is_ahead = queue.is_long();
            task = is_ahead ? queue.take() : -1;
            Tile next = task < 0 ? tile : tile_of(task);
            begin(tile, scratch);
            const int64_t last = tile.last / chunk_keys_;
            for (int64_t number = first_chunk(tile); number <= last; ++number) {
                if (number < last) {
                    gather(tile, number + 1, *next_chunk);
                } else {
                    gather(next, first_chunk(next), *next_chunk);
                }
                attend(tile, *chunk, *next_chunk, scratch);
                std::swap(chunk, next_chunk);
            }
            finish(tile, scratch);
            if (!is_ahead && (task = queue.take()) >= 0) {
                next = tile_of(task);
                gather(next, first_chunk(next), *chunk);
            }
            tile = next;
        }
    }

  private:
    struct Tile {
        const Span* span;
        int64_t kv_head;
        int64_t num_rows, first_row;  // first_row: of the span, token * group + head of group
        int64_t first, last;          // positions that its rows see
    };

    struct Scratch {
        alignas(64) float q[kTileRows * kMaxDim];
        alignas(64) float o[kTileRows * kMaxDim];
        alignas(64) float scores[kTileRows * (kMaxSlots + 16)];
        float largest[kTileRows];
        float sum[kTileRows];
    };

    Tile tile_of(int64_t task) const {
        const int64_t number = task / pool_.num_kv_heads;
        Tile tile;
        tile.span = pass_.find_span(number, [](const Span& s) { return s.first_tile; });
        tile.kv_head = task % pool_.num_kv_heads;
        tile.first_row = (number - tile.span->first_tile) * kTileRows;
        tile.num_rows = std::min(kTileRows, tile.span->length * pool_.group() - tile.first_row);
        tile.first = first_visible(position(tile, 0));
        tile.last = position(tile, tile.num_rows - 1);
        return tile;
    }

    int64_t position(const Tile& tile, int64_t r) const {
        return tile.span->start + (tile.first_row + r) / pool_.group();
    }
    int64_t first_visible(int64_t position) const {
        return pool_.window ? std::max<int64_t>(0, position - pool_.window + 1) : 0;
    }
    int64_t first_chunk(const Tile& tile) const { return tile.first / chunk_keys_; }

    // Call body(r, row of the pass, query head) for every row r of the tile.
    template <class Body>
    void for_rows(const Tile& tile, const Body& body) const {
        const int64_t group = pool_.group();
        for (int64_t r = 0; r < tile.num_rows; ++r) {
            const int64_t token = (tile.first_row + r) / group;
            const int64_t head = tile.kv_head * group + (tile.first_row + r) % group;
            body(r, tile.span->first_row + token, head);
        }
    }

    void begin(const Tile& tile, Scratch& scratch) const {
        // Scores in powers of two: one multiplication less for each.
        const float factor = kLog2E / std::sqrt(static_cast<float>(dim_));
        for_rows(tile, [&](int64_t r, int64_t row, int64_t head) {
            const float* q = in_.q + row * in_.q_stride + head * dim_;
            prepare_head(q, in_.q_norm, in_.eps, pass_.angles(row, dim_), dim_, factor,
                         scratch.q + r * dim_);
            scratch.largest[r] = kLowest;
            scratch.sum[r] = 0.0f;
        });
        std::fill_n(scratch.o, tile.num_rows * padded_dim_, 0.0f);
    }

    // Describe keys of chunk `number` of the sequence, as far as rows of the tile see them.
    void gather(const Tile& tile, int64_t number, Chunk<T>& chunk) const {
        const int32_t* table = pass_.tables + tile.span->table;
        const int64_t first_block = number * blocks_per_chunk_;
        const int64_t begin_block = std::max(first_block, tile.first / pool_.block_size);
        const int64_t end_block =
            std::min(first_block + blocks_per_chunk_, tile.last / pool_.block_size + 1);
        chunk.num_blocks = end_block - begin_block;
        chunk.num_vectors = 0;
        for (int64_t b = 0; b < chunk.num_blocks; ++b) {
            const int64_t block = table[begin_block + b];
            const int64_t start = (begin_block + b) * pool_.block_size;
            chunk.block_keys[b] = cells_.keys(block, tile.kv_head);
            chunk.block_values[b] = cells_.values(block, tile.kv_head);
            chunk.first_slot[b] = std::max<int64_t>(0, tile.first - start);
            chunk.last_slot[b] = std::min(pool_.block_size, tile.last + 1 - start);
            // Scores lie as slots do, those of padding included.
            const int64_t end = b + 1 < chunk.num_blocks ? slots_ : chunk.last_slot[b];
            for (int64_t slot = 0; slot < end; slot += kLanes) {
                const int64_t v = chunk.num_vectors++;
                chunk.keys[v] = chunk.block_keys[b] + slot;
                chunk.values[v] = chunk.block_values[b] + slot * padded_dim_;
                chunk.position[v] = start + slot;
                chunk.num_slots[v] = pool_.block_size - slot;
                if constexpr (std::is_same_v<T, int8_t>) {
                    chunk.key_scales[v] = cells_.key_scales(block, tile.kv_head) + slot;
                    chunk.value_scales[v] = cells_.value_scales(block, tile.kv_head) + slot;
                }
            }
        }
    }

    // Add a chunk of keys to all rows of the tile; `next` is the one that comes after it.
    void attend(const Tile& tile, const Chunk<T>& chunk, const Chunk<T>& next,
                Scratch& scratch) const {
        const auto steps = [&](auto fetches) {
            score<fetches>(tile, chunk, scratch);
            weigh(tile, chunk, scratch);
            mix<fetches>(tile, chunk, next, scratch);
        };
        if (tile.num_rows <= kRowBlock) {
            steps(std::true_type{});
        } else {
            steps(std::false_type{});
        }
    }

    // Scores of all rows of the tile on all keys of the chunk; keys outermost, so that they stay in
    // the first cache while the rows pass over them.
    template <bool kFetch>
    void score(const Tile& tile, const Chunk<T>& chunk, Scratch& scratch) const {
        for (int64_t v = 0; v < chunk.num_vectors; v += 2) {
            for (int64_t r = 0; r < tile.num_rows; r += kRowBlock) {
                const float* q = scratch.q + r * dim_;
                float* scores = scratch.scores + r * score_stride_ + kLanes * v;
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

    void weigh(const Tile& tile, const Chunk<T>& chunk, Scratch& scratch) const {
        for (int64_t r = 0; r < tile.num_rows; ++r) weigh(r, position(tile, r), chunk, scratch);
    }

    // Turn row r's scores into weights, zero where nothing is seen, and scale what it has so far.
    void weigh(int64_t r, int64_t position, const Chunk<T>& chunk, Scratch& scratch) const {
        float* scores = scratch.scores + r * score_stride_;
        const int64_t first = first_visible(position);
        Floats highest = all(scratch.largest[r]);
        for (int64_t v = 0; v < chunk.num_vectors; ++v) {
            const Floats score = load(scores + kLanes * v);
            highest = choose(chunk.lanes(v, first, position), maximum(highest, score), highest);
        }
        const float largest = largest_of(highest);
        const Floats shift = all(largest);
        Floats sum = zeros();
        for (int64_t v = 0; v < chunk.num_vectors; ++v) {
            const Floats score = load(scores + kLanes * v);
            const Lanes lanes = chunk.lanes(v, first, position);
            Floats weight = keep(lanes, exp2(score - shift));
            sum = sum + weight;
            if constexpr (std::is_same_v<T, int8_t>) {
                // The values' scales ride on the weights.
                weight = keep(lanes, weight * load(chunk.value_scales[v]));
            }
            store(scores + kLanes * v, weight);
        }
        const Floats shrink = exp2(all(scratch.largest[r]) - shift);
        scratch.largest[r] = largest;
        scratch.sum[r] = scratch.sum[r] * first_of(shrink) + sum_of(sum);
        float* o = scratch.o + r * padded_dim_;
        for (int64_t d = 0; d < padded_dim_; d += kLanes) store(o + d, load(o + d) * shrink);
    }

    template <bool kFetch>
    void mix(const Tile& tile, const Chunk<T>& chunk, const Chunk<T>& next,
             Scratch& scratch) const {
        for (int64_t r = 0; r < tile.num_rows; r += kRowBlock) {
            const float* weights = scratch.scores + r * score_stride_;
            with_rows(tile.num_rows - r, [&](auto rows) {
                for (int64_t d = 0; d < padded_dim_; d += 2 * kLanes) {
                    float* o = scratch.o + r * padded_dim_ + d;
                    if (d + kLanes < padded_dim_) {
                        mix_block<T, rows, 2, kFetch>(weights, score_stride_, chunk, next, d,
                                                      slots_, padded_dim_, o);
                    } else {
                        mix_block<T, rows, 1, kFetch>(weights, score_stride_, chunk, next, d,
                                                      slots_, padded_dim_, o);
                    }
                }
            });
        }
    }

    void finish(const Tile& tile, const Scratch& scratch) const {
        for_rows(tile, [&](int64_t r, int64_t row, int64_t head) {
            float* out = out_ + (row * pool_.num_heads + head) * dim_;
            const float* o = scratch.o + r * padded_dim_;
            const Floats inverse = all(1.0f / scratch.sum[r]);
            for (int64_t d = 0; d < dim_; d += kLanes) {
                store_some(out + d, load(o + d) * inverse, dim_ - d);
            }
        });
    }

    const Pool& pool_;
    const Pass& pass_;
    const Inputs& in_;
    const Cells<T> cells_;
    float* const out_;
    const int64_t dim_, slots_, padded_dim_, blocks_per_chunk_, chunk_keys_, score_stride_;
};

}  // namespace rs

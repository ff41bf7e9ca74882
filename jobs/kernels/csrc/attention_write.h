// Writes a pass's keys and values into the pool.
#pragma once

#include <type_traits>

#include "attention_cells.h"
#include "attention_rows.h"

namespace rs {

template <class T>
class Writer {
  public:
    Writer(const Pool& pool, const Pass& pass, const Inputs& in, int64_t layer, int threads)
        : pool_(pool), pass_(pass), in_(in), cells_(pool, layer), rows_(pass.num_rows()),
          task_rows_(std::clamp<int64_t>(rows_ / (4 * threads), 1, kMaxTaskRows)) {}

    int64_t num_tasks() const { return ceil_div(rows_, task_rows_); }

    // Write keys and values of a few tokens.
    void run(int64_t task) const {
        const int64_t last = std::min((task + 1) * task_rows_, rows_);
        int64_t row = task * task_rows_;
        const Span* span = pass_.find_span(row, [](const Span& s) { return s.first_row; });
        while (row < last) {
            while (row >= span[1].first_row) ++span;
            const int64_t position = span->start + row - span->first_row;
            const int64_t slot = position % pool_.block_size;
            const int64_t block = pass_.tables[span->table + position / pool_.block_size];
            const int64_t in_block = std::min(last, row + pool_.block_size - slot);
            const int64_t stop = std::min(in_block, span[1].first_row);
            for (int64_t head = 0; head < pool_.num_kv_heads; ++head) {
                write_head(row, stop - row, block, slot, head);
            }
            row = stop;
        }
    }

  private:
    static constexpr int64_t kMaxTaskRows = 16;

    // Write one head of tokens that lie side by side in a block. Their keys are stored together,
    // feature by feature: a line of memory holds one feature of many tokens.
    void write_head(int64_t row, int64_t count, int64_t block, int64_t slot,
                    int64_t kv_head) const {
        const int64_t dim = pool_.head_dim, slots = pool_.slots();
        T rounded[kMaxTaskRows][kMaxDim];
        T* values = cells_.values(block, kv_head) + slot * pool_.padded_dim();
        for (int64_t t = 0; t < count; ++t) {
            alignas(64) float head[kMaxDim];
            const float* k = in_.k + (row + t) * in_.k_stride + kv_head * dim;
            const float* v = in_.v + (row + t) * in_.v_stride + kv_head * dim;
            prepare_head(k, in_.k_norm, in_.eps, pass_.angles(row + t, dim), dim, 1.0f, head);
            if constexpr (std::is_same_v<T, int8_t>) {
                cells_.key_scales(block, kv_head)[slot + t] = store_head(rounded[t], head, dim);
                cells_.value_scales(block, kv_head)[slot + t] =
                    store_head(values + t * pool_.padded_dim(), v, dim);
            } else {
                store_head(rounded[t], head, dim);
                store_head(values + t * pool_.padded_dim(), v, dim);
            }
        }
        T* keys = cells_.keys(block, kv_head) + slot;
        for (int64_t d = 0; d < dim; ++d, keys += slots) {
            for (int64_t t = 0; t < count; ++t) keys[t] = rounded[t][d];
        }
    }

    const Pool& pool_;
    const Pass& pass_;
    const Inputs& in_;
    const Cells<T> cells_;
    const int64_t rows_, task_rows_;
};

}  // namespace rs

// Where the keys and values of one layer lie in a pool of blocks.
#pragma once

#include "attention.h"

namespace rs {

template <class T>
class Cells {
  public:
    Cells(const Pool& pool, int64_t layer) : pool_(pool), layer_(layer) {}

    T* keys(int64_t block, int64_t kv_head) const {
        const int64_t cell = pool_.cell(layer_, block, kv_head);
        return static_cast<T*>(pool_.keys) + cell * pool_.head_dim * pool_.slots();
    }
    T* values(int64_t block, int64_t kv_head) const {
        const int64_t cell = pool_.cell(layer_, block, kv_head);
        return static_cast<T*>(pool_.values) + cell * pool_.slots() * pool_.padded_dim();
    }
    float* key_scales(int64_t block, int64_t kv_head) const {
        return pool_.scales + pool_.cell(layer_, block, kv_head) * pool_.slots();
    }
    float* value_scales(int64_t block, int64_t kv_head) const {
        return key_scales(block, kv_head) + pool_.num_cells() * pool_.slots();
    }

  private:
    const Pool& pool_;
    const int64_t layer_;
};

}  // namespace rs

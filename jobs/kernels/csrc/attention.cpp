// Attention of a ragged batch over a pool of blocks: decoding and prefilling spans in one call.
//
// First every token's key and value are written, then every query is computed.
#include "attention.h"

#include "attention_tiles.h"
#include "attention_write.h"

namespace rs {
namespace {

constexpr int64_t kParallelKeys = 192;  // fewer keys are read sooner than a thread is woken

template <class T>
void attend_layer(const Pool& pool, const Pass& pass, const Inputs& in, int64_t layer, float* out,
                  int threads) {
    const Writer<T> writer(pool, pass, in, layer, threads);
    const Attender<T> attender(pool, pass, in, layer, out);
    const int64_t num_writes = writer.num_tasks();
    if (pass.num_key_tokens * pool.num_kv_heads < kParallelKeys) threads = 1;
    std::atomic<int64_t> next_write{0};
    TileQueue tiles(attender.num_tasks(), threads);
    const auto write = [&] {
        for (int64_t task; (task = next_write.fetch_add(1)) < num_writes;) writer.run(task);
    };
    if (threads <= 1) {
        write();
        attender.run(tiles);
        return;
    }
#pragma omp parallel num_threads(threads)
    {
        write();
#pragma omp barrier
        attender.run(tiles);
    }
}

}  // namespace

void attend_paged(const Pool& pool, const Pass& pass, const Inputs& in, int64_t layer, float* out,
                  int threads) {
    switch (pool.type) {
        case CacheType::kFloat32:
            return attend_layer<float>(pool, pass, in, layer, out, threads);
        case CacheType::kBfloat16:
            return attend_layer<Bfloat16>(pool, pass, in, layer, out, threads);
        case CacheType::kInt8:
            return attend_layer<int8_t>(pool, pass, in, layer, out, threads);
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

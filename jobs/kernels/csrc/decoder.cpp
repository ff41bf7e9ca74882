// A whole forward pass of a decoder in one call: from token ids to hidden states.
//
// Nothing is computed here. Every step is a kernel that can be called on its own, and the result is
// bitwise that of calling them one by one. One call instead of some two hundred leaves the other
// threads of a serving process alone: each call from Python has to wait for the interpreter's lock
// when it returns.
#include <cstring>

#include "amx.h"
#include "decoder_rows.h"

namespace rs {
namespace {

constexpr int64_t kChunkRows = 24;  // that one thread computes together, where rows are shared
constexpr int64_t kFullTile = 12;   // of most products, or several of them

// body(rows, thread) for all rows, by each thread for other rows, so that none waits for another
// before the end. Chunks get smaller towards the end, which all then reach at about the same time.
template <class Body>
void parallel_chunks(int64_t num_rows, int threads, const Body& body) {
    std::atomic<int64_t> next{0};
    const auto take = [&]() -> Rows {
        int64_t first = next.load(std::memory_order_relaxed);
        for (;;) {
            const int64_t left = num_rows - first;
            if (left <= 0) return {num_rows, 0};
            const int64_t share = round_up(ceil_div(left, 2 * threads), kFullTile);
            const int64_t count = std::min({left, share, kChunkRows});
            if (next.compare_exchange_weak(first, first + count)) return {first, count};
        }
    };
#pragma omp parallel num_threads(threads)
    {
        const int thread = omp_get_thread_num();
        for (Rows rows; (rows = take()).count > 0;) body(rows, thread);
    }
}

class PassRunner {
  public:
    PassRunner(const Decoder& decoder, const Pool& pool, const Pass& pass, const Space& space,
               int threads)
        : decoder_(decoder), pool_(pool), pass_(pass), space_(space), threads_(threads),
          rows_(pass.num_rows()) {}

    void run(const int64_t* tokens, const int64_t* wanted, int64_t num_wanted, float* out) {
        const int64_t width = decoder_.hidden_size;
        rs_embed(decoder_.embedding, static_cast<int32_t>(decoder_.is_embedding_half), tokens,
                 space_.h, rows_, width, threads_);
        for_rows([&](const RowRunner& runner, Rows rows) {
            runner.prepare(decoder_.layers[0], rows);
        });
        for (int64_t layer = 0; layer < decoder_.num_layers; ++layer) {
            const bool is_last = layer + 1 == decoder_.num_layers;
            attend(decoder_.layers[layer], layer);
            // Nothing attends to what comes out of the last layer.
            if (is_last) keep(wanted, num_wanted);
            for_rows([&](const RowRunner& runner, Rows rows) {
                runner.project(decoder_.layers[layer], rows);
                runner.transform(decoder_.layers[layer], rows);
                if (!is_last) runner.prepare(decoder_.layers[layer + 1], rows);
            });
        }
        rs_rms_norm(space_.h, decoder_.norm, out, rows_, width, width,
                    static_cast<float>(decoder_.eps), threads_);
    }

  private:
    void attend(const LayerWeights& weights, int64_t layer) const {
        const int64_t stride = pool_.q_width() + 2 * pool_.k_width();
        const float* k = space_.qkv + pool_.q_width();
        const float* v = k + pool_.k_width();
        const Inputs inputs{space_.qkv,     k,      v,
                            stride,         stride, stride,
                            weights.q_norm, weights.k_norm, static_cast<float>(decoder_.eps)};
        attend_paged(pool_, pass_, inputs, layer, space_.o, threads_);
    }

    // Go on with these rows alone.
    void keep(const int64_t* wanted, int64_t num_wanted) {
        for (int64_t row = 0; row < num_wanted; ++row) {  // wanted[row] >= row: they rise.
            const auto move = [&](float* rows, int64_t width) {
                std::memmove(rows + row * width, rows + wanted[row] * width, width * sizeof(float));
            };
            move(space_.h, decoder_.hidden_size);
            move(space_.o, pool_.q_width());
        }
        rows_ = num_wanted;
    }

    // body(runner, rows) for all rows: many are shared between the threads, each of which goes its
    // way with a few at a time; few are computed by all threads together, which share the weights
    // and wait for each other after every step. On AMX products wait for weights: they are shared.
    template <class Body>
    void for_rows(const Body& body) const {
        if (threads_ == 1 || rows_ < 2 * kChunkRows * threads_ || has_amx()) {
            return body(RowRunner(decoder_, pool_, space_, threads_), Rows{0, rows_});
        }
        parallel_chunks(rows_, threads_, [&](Rows rows, int thread) {
            body(RowRunner(decoder_, pool_, own_space(thread), 1), rows);
        });
    }

    // One thread's part of the space, with room for a chunk.
    Space own_space(int thread) const {
        const int64_t width = decoder_.intermediate_size;
        const int64_t widest =
            padded_inputs(std::max({decoder_.hidden_size, pool_.q_width(), width}));
        const int64_t first = thread * kChunkRows;
        Space own = space_;
        own.x += first * decoder_.hidden_size;
        own.gate_up += first * 2 * width;
        own.values += first * widest;
        own.row_scales += first;
        own.sums += first * (widest / kSumBlock);
        return own;
    }

    const Decoder& decoder_;
    const Pool& pool_;
    const Pass& pass_;
    const Space& space_;
    const int threads_;
    int64_t rows_;
};

}  // namespace
}  // namespace rs

// Write out [N, C], the hidden states after the final norm of the N wanted rows of the pass, which
// rise; keys and values of all its tokens are written.
RS_EXPORT void rs_decoder_pass(const rs::Decoder* decoder, const rs::Pool* pool,
                               const rs::Pass* pass, const rs::Space* space,
                               const int64_t* tokens, const int64_t* wanted, int64_t num_wanted,
                               float* out, int32_t threads) {
    rs::PassRunner(*decoder, *pool, *pass, *space, threads).run(tokens, wanted, num_wanted, out);
}

// A whole forward pass of a decoder in one call: from token ids to hidden states.
//
// Nothing is computed here. Every step is a kernel that can be called on its own, and the result is
// bitwise that of calling them one by one. One call instead of some two hundred leaves the other
// threads of a serving process alone: each call from Python has to wait for the interpreter's lock
// when it returns.
#include <cstring>

#include "attention.h"
#include "elementwise.h"
#include "products.h"
#include "quantize.h"

namespace rs {

enum class Scheme : int64_t { kBf16 = 0, kW8A8 = 1, kW4A16 = 2, kW4A8 = 3 };

// The structures below are mirrored in jobs/kernels/decoder_pass.py.
struct Linear {
    Scheme scheme;
    const uint8_t* packed;
    const float* scales;  // w8a8 only
    const float* bias;    // null: none
    int64_t inputs, outputs, group;

    bool takes_int8() const { return scheme == Scheme::kW8A8 || scheme == Scheme::kW4A8; }
};

// Linear layers that read the same rows; their outputs lie side by side.
struct Joined {
    int64_t count;
    Linear parts[3];

    bool takes_int8() const {
        return std::any_of(parts, parts + count, [](const Linear& l) { return l.takes_int8(); });
    }
    bool takes_floats() const {
        return !std::all_of(parts, parts + count, [](const Linear& l) { return l.takes_int8(); });
    }
};

struct LayerWeights {
    const float *input_norm, *post_norm;
    const float *q_norm, *k_norm;  // null: none
    Joined qkv, o, gate_up, down;
};

struct Decoder {
    const LayerWeights* layers;
    int64_t num_layers;
    const void* embedding;
    int64_t is_embedding_half;
    const float* norm;
    int64_t hidden_size, intermediate_size;
    double eps;
};

// Memory of a pass. Rows of qkv and gate_up lie as many floats apart as they are wide.
struct Space {
    float *h, *x, *qkv, *o, *gate_up;
    int8_t* values;
    float* row_scales;
    int32_t* sums;
};

namespace {

// Rows that pass through a gated MLP together: what they take between its products, 2 x 4 bytes x F
// a row, then stays in the cache that the cores share.
constexpr int64_t kMlpRows = 144;
constexpr int64_t kGateMultiple = 32;  // of gates, for products that gate (products.h)

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
        for (int64_t layer = 0; layer < decoder_.num_layers; ++layer) {
            const LayerWeights& weights = decoder_.layers[layer];
            attend(weights, layer);
            // Nothing attends to what comes out of the last layer.
            if (layer + 1 == decoder_.num_layers) keep(wanted, num_wanted);
            project(weights);
            transform(weights);
        }
        rs_rms_norm(space_.h, decoder_.norm, out, rows_, width, width, eps(), threads_);
    }

  private:
    struct Rows {
        int64_t first, count;
    };

    float* residual(Rows rows) const { return space_.h + rows.first * decoder_.hidden_size; }
    float eps() const { return static_cast<float>(decoder_.eps); }

    void attend(const LayerWeights& weights, int64_t layer) const {
        const int64_t q_width = pool_.num_heads * pool_.head_dim;
        const int64_t k_width = pool_.num_kv_heads * pool_.head_dim;
        const int64_t stride = q_width + 2 * k_width;
        normalize(weights.input_norm, weights.qkv, {0, rows_});
        multiply(weights.qkv, space_.x, decoder_.hidden_size, space_.qkv, stride, rows_,
                 Mode::kSet);
        const float* k = space_.qkv + q_width;
        const Inputs inputs{space_.qkv, k,      k + k_width,    stride,         stride,
                            stride,     weights.q_norm, weights.k_norm, eps()};
        attend_paged(pool_, pass_, inputs, layer, space_.o, threads_);
    }

    // Go on with these rows alone.
    void keep(const int64_t* wanted, int64_t num_wanted) {
        const int64_t q_width = pool_.num_heads * pool_.head_dim;
        for (int64_t row = 0; row < num_wanted; ++row) {  // wanted[row] >= row: they rise.
            const auto move = [&](float* rows, int64_t width) {
                std::memmove(rows + row * width, rows + wanted[row] * width, width * sizeof(float));
            };
            move(space_.h, decoder_.hidden_size);
            move(space_.o, q_width);
        }
        rows_ = num_wanted;
    }

    void project(const LayerWeights& weights) const {
        const int64_t q_width = pool_.num_heads * pool_.head_dim;
        if (weights.o.takes_int8()) {
            rs_quantize_rows(space_.o, space_.values, space_.row_scales, space_.sums, rows_,
                             q_width, q_width, threads_);
        }
        multiply(weights.o, space_.o, q_width, space_.h, decoder_.hidden_size, rows_,
                 Mode::kAdd);
    }

    void transform(const LayerWeights& weights) const {
        for (int64_t first = 0; first < rows_; first += kMlpRows) {
            const Rows rows{first, std::min(kMlpRows, rows_ - first)};
            const int64_t width = decoder_.intermediate_size;
            normalize(weights.post_norm, weights.gate_up, rows);
            int64_t stride = width;
            if (weights.gate_up.count == 1 && width % kGateMultiple == 0) {
                multiply(weights.gate_up, space_.x, decoder_.hidden_size, space_.gate_up, stride,
                         rows.count, Mode::kGate);
            } else {
                stride = 2 * width;
                multiply(weights.gate_up, space_.x, decoder_.hidden_size, space_.gate_up, stride,
                         rows.count, Mode::kSet);
                rs_silu_mul(space_.gate_up, space_.gate_up, rows.count, width, stride, stride,
                            threads_);
            }
            if (weights.down.takes_int8()) {
                rs_quantize_rows(space_.gate_up, space_.values, space_.row_scales, space_.sums,
                                 rows.count, width, stride, threads_);
            }
            multiply(weights.down, space_.gate_up, stride, residual(rows), decoder_.hidden_size,
                     rows.count, Mode::kAdd);
        }
    }

    // Normalise rows of h in the form, or the forms, that the layers read; from the beginning of
    // x and of the quantized rows.
    void normalize(const float* weight, const Joined& readers, Rows rows) const {
        const int64_t width = decoder_.hidden_size;
        if (!readers.takes_floats()) {
            rs_rms_norm_quantize(residual(rows), weight, space_.values, space_.row_scales,
                                 space_.sums, rows.count, width, width, eps(), threads_);
            return;
        }
        rs_rms_norm(residual(rows), weight, space_.x, rows.count, width, width, eps(), threads_);
        if (readers.takes_int8()) {
            rs_quantize_rows(space_.x, space_.values, space_.row_scales, space_.sums, rows.count,
                             width, width, threads_);
        }
    }

    // Store in y what the layers make of x, or of its int8 form where they read that.
    void multiply(const Joined& joined, const float* x, int64_t x_stride, float* y,
                  int64_t y_stride, int64_t rows, Mode mode) const {
        for (int64_t i = 0; i < joined.count; ++i) {
            multiply(joined.parts[i], x, x_stride, y, y_stride, rows, mode);
            y += joined.parts[i].outputs;
        }
    }

    void multiply(const Linear& l, const float* x, int64_t x_stride, float* y, int64_t y_stride,
                  int64_t rows, Mode mode) const {
        const Space& s = space_;
        switch (l.scheme) {
            case Scheme::kBf16:
                return rs_linear_dense(x, l.packed, l.bias, y, rows, l.inputs, l.outputs,
                                       x_stride, y_stride, mode, threads_);
            case Scheme::kW8A8:
                return rs_linear_w8a8(s.values, s.row_scales, s.sums, l.packed, l.scales, l.bias,
                                      y, rows, l.inputs, l.outputs, y_stride, mode, threads_);
            case Scheme::kW4A16:
                return rs_linear_w4a16(x, l.packed, l.bias, y, rows, l.inputs, l.outputs, l.group,
                                       x_stride, y_stride, mode, threads_);
            case Scheme::kW4A8:
                return rs_linear_w4a8(s.values, s.row_scales, s.sums, l.packed, l.bias, y, rows,
                                      l.inputs, l.outputs, l.group, y_stride, mode, threads_);
        }
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

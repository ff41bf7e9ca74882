// What a decoder does to rows of a pass between the attention of one layer and of the next: all
// that a row goes through alone, from what attention gave, through the residual stream, to new
// queries, keys and values.
#pragma once

#include "attention.h"
#include "elementwise.h"
#include "linear.h"
#include "products.h"
#include "quantize.h"

namespace rs {

enum class Scheme : int64_t { kBf16 = 0, kW8A8 = 1, kW4A16 = 2, kW4A8 = 3, kW8A16 = 4 };

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

struct Rows {
    int64_t first, count;
};

// Computes rows with so many threads, in memory that is its own but for h, qkv and o, where rows of
// the pass have their places.
class RowRunner {
    // Rows that pass through a gated MLP together: what they take between its products, 2 x 4 bytes
    // x F a row, then stays in the cache that the cores share.
    static constexpr int64_t kMlpRows = 144;

  public:
    RowRunner(const Decoder& decoder, const Pool& pool, const Space& space, int threads)
        : decoder_(decoder), pool_(pool), space_(space), threads_(threads) {}

    // From the residual stream to queries, keys and values.
    void prepare(const LayerWeights& weights, Rows rows) const {
        const int64_t stride = pool_.q_width() + 2 * pool_.k_width();
        normalize(weights.input_norm, weights.qkv, rows);
        multiply(weights.qkv, space_.x, decoder_.hidden_size, space_.qkv + rows.first * stride,
                 stride, rows.count, Mode::kSet);
    }

    // From what attention gave back to the residual stream.
    void project(const LayerWeights& weights, Rows rows) const {
        const float* o = space_.o + rows.first * pool_.q_width();
        if (weights.o.takes_int8()) quantize(o, rows.count, pool_.q_width(), pool_.q_width());
        multiply(weights.o, o, pool_.q_width(), residual(rows), decoder_.hidden_size, rows.count,
                 Mode::kAdd);
    }

    void transform(const LayerWeights& weights, Rows all) const {
        const int64_t end = all.first + all.count;
        for (int64_t first = all.first; first < end; first += kMlpRows) {
            const Rows rows{first, std::min(kMlpRows, end - first)};
            const int64_t width = weights.down.parts[0].inputs;
            normalize(weights.post_norm, weights.gate_up, rows);
            int64_t stride = width;
            if (weights.gate_up.count == 1 && width % kBlockOutputs == 0) {
                multiply(weights.gate_up, space_.x, decoder_.hidden_size, space_.gate_up, stride,
                         rows.count, Mode::kGate);
            } else {
                stride = 2 * width;
                multiply(weights.gate_up, space_.x, decoder_.hidden_size, space_.gate_up, stride,
                         rows.count, Mode::kSet);
                rs_silu_mul(space_.gate_up, space_.gate_up, rows.count, width, stride, stride,
                            threads_);
            }
            if (weights.down.takes_int8()) quantize(space_.gate_up, rows.count, width, stride);
            multiply(weights.down, space_.gate_up, stride, residual(rows), decoder_.hidden_size,
                     rows.count, Mode::kAdd);
        }
    }

  private:
    float* residual(Rows rows) const { return space_.h + rows.first * decoder_.hidden_size; }
    float eps() const { return static_cast<float>(decoder_.eps); }

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
        if (readers.takes_int8()) quantize(space_.x, rows.count, width, width);
    }

    void quantize(const float* x, int64_t rows, int64_t width, int64_t stride) const {
        rs_quantize_rows(x, space_.values, space_.row_scales, space_.sums, rows, width, stride,
                         threads_);
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
            case Scheme::kW8A16:
                return rs_linear_w8a16(x, l.packed, l.bias, y, rows, l.inputs, l.outputs, l.group,
                                       x_stride, y_stride, mode, threads_);
            case Scheme::kW4A8:
                return rs_linear_w4a8(s.values, s.row_scales, s.sums, l.packed, l.bias, y, rows,
                                      l.inputs, l.outputs, l.group, y_stride, mode, threads_);
        }
    }

    const Decoder& decoder_;
    const Pool& pool_;
    const Space space_;
    const int threads_;
};

}  // namespace rs

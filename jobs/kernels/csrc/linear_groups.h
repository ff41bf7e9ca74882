// Packed weights with a scale per group of inputs: int4 for W4A8 and W4A16, int8 for W8A16.
//
// A block is [I / group] groups, each a vector of scales and group / inputs steps of two vectors,
// where a step has 8 inputs of int4 weights or 4 of int8.
// Scales: bfloat16 [kLanes, 2], lane n holds the scales of outputs n and kLanes + n.
// Step of int4: uint8 [outputs, 4]: byte b of an output holds w + 8 of inputs b (low half) and b + 4.
// Step of int8: int8 [4, outputs].
#pragma once

#include "linear.h"

namespace rs {

template <int64_t kInputs>
struct GroupedWeights {
    static constexpr int64_t kStepInputs = kInputs;

    const uint8_t* packed;
    int64_t inputs;
    int64_t group;

    int64_t groups() const { return inputs / group; }
    int64_t block_bytes() const { return groups() * (kVectorBytes + group / kInputs * kStep); }
};

using Int4Weights = GroupedWeights<8>;
using Int8Weights = GroupedWeights<4>;

}  // namespace rs

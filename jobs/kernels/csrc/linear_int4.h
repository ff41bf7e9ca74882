// Packed int4 weights, shared by W4A8 and W4A16.
//
// A block is [I / group] groups, each a vector of scales and group / 8 steps of two vectors.
// Scales: bfloat16 [kLanes, 2], lane n holds the scales of outputs n and kLanes + n.
// Step: uint8 [outputs, 4] for 8 inputs: byte b of an output holds w + 8 of inputs b (low half) and
// b + 4.
#pragma once

#include "linear.h"

namespace rs {

constexpr int64_t kStepInputs = 8;

struct Int4Weights {
    const uint8_t* packed;
    int64_t inputs;
    int64_t group;

    int64_t groups() const { return inputs / group; }
    int64_t block_bytes() const { return groups() * (kVectorBytes + group / kStepInputs * kStep); }
};

}  // namespace rs

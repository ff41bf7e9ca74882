#include "linear.h"

// Write how weights are packed: outputs of a block, int8 inputs of an output that lie together, and
// what is added to int8 weights.
RS_EXPORT void rs_weight_layout(int64_t* layout) {
    layout[0] = rs::kBlockOutputs, layout[1] = rs::kInt8Inputs, layout[2] = rs::kInt8Offset;
}

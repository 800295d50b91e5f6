// Convolutions and linear layers as ops of ONNX Runtime, on the CPU: msda::NhwcConv and msda::Linear, version 1, and of
// each the same with Relu, Add and AddRelu behind its name.
#pragma once

#include <cstddef>

#include "../msda/ort_abi.h"

// The op of this index, null after the last one.
const ort::CustomOp* conv_op(size_t index);

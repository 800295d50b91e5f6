// What the adapters' ops have in common: the functions of ONNX Runtime that a call needs, and errors of its kind.
#pragma once

#include <cstdarg>
#include <cstdio>

#include "ort_abi.h"

namespace ort {

template <typename Function>
Function at(Api* api, Slot slot) {
  return reinterpret_cast<Function>(const_cast<void*>(api[slot]));
}

// The functions of the table that a call needs.
struct Runtime {
  CreateStatus create_status;
  KernelContextGetInput get_input;
  KernelContextGetOutput get_output;
  GetTensorMutableData get_data;
  GetTensorElementTypeAndShapeDataReference get_shape;
  KernelContextParallelFor parallel_for;
  KernelContextGetGPUComputeStream get_stream;

  explicit Runtime(Api* api)
      : create_status(at<CreateStatus>(api, kSlotCreateStatus)),
        get_input(at<KernelContextGetInput>(api, kSlotKernelContextGetInput)),
        get_output(at<KernelContextGetOutput>(api, kSlotKernelContextGetOutput)),
        get_data(at<GetTensorMutableData>(api, kSlotGetTensorMutableData)),
        get_shape(at<GetTensorElementTypeAndShapeDataReference>(api, kSlotGetTensorElementTypeAndShapeDataReference)),
        parallel_for(at<KernelContextParallelFor>(api, kSlotKernelContextParallelFor)),
        get_stream(at<KernelContextGetGPUComputeStream>(api, kSlotKernelContextGetGPUComputeStream)) {}
};

// "op: what was wrong".
inline Status* invalid(const Runtime& runtime, const char* op, const char* format, va_list values) {
  char message[512];
  const int head = snprintf(message, sizeof(message), "%s: ", op);
  vsnprintf(message + head, sizeof(message) - head, format, values);
  return runtime.create_status(kInvalidArgument, message);
}

struct Tensor {
  const void* data;
  const int64_t* sizes;
  size_t rank;
};

constexpr size_t kMaxRank = 6;

// "[2, 3, 4]"
struct Brackets {
  char text[24 * kMaxRank + 32];

  Brackets(const int64_t* sizes, size_t rank) {
    size_t length = snprintf(text, sizeof(text), "[");
    for (size_t i = 0; i < rank && i < kMaxRank; ++i)
      length += snprintf(text + length, sizeof(text) - length, i ? ", %lld" : "%lld", static_cast<long long>(sizes[i]));
    snprintf(text + length, sizeof(text) - length, rank > kMaxRank ? ", ...]" : "]");
  }
  explicit Brackets(const Tensor& tensor) : Brackets(tensor.sizes, tensor.rank) {}
};

}  // namespace ort

// The part of ONNX Runtime's C interface that the adapter uses, declared by us, so that no SDK is needed to build it.
//
// Its table of functions only ever grows: a function keeps its place in it from the release that brought it on. The
// tests go through every one named here.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ort {

constexpr uint32_t kFirstApiVersion = 1;
constexpr uint32_t kApiVersion = 24;      // the release, 1.24, that brought the newest of kSlot...
constexpr uint32_t kCustomOpVersion = 17;  // of CustomOp's fields; those it brings are read from 1.17 on

constexpr int kFail = 1, kInvalidArgument = 2;            // of the error codes
constexpr int kFloat = 1, kInt64 = 7, kFloat16 = 10;      // of the element types
constexpr int kRequired = 0;                              // of an input's or output's characteristics
constexpr int kHostMemory = -2, kDefaultMemory = 0;       // of an input's memory types

struct Status;
struct SessionOptions;
struct CustomOpDomain;
struct KernelInfo;
struct KernelContext;
struct Value;
struct CustomOp;
struct ShapeInferContext;

// One entry of the table: its place, and the type to call it by.
enum Slot : size_t {
  kSlotCreateStatus = 0,
  kSlotCreateCustomOpDomain = 26,
  kSlotCustomOpDomainAdd = 27,
  kSlotAddCustomOpDomain = 28,
  kSlotGetTensorMutableData = 51,
  kSlotKernelContextGetInput = 90,
  kSlotKernelContextGetOutput = 91,
  kSlotKernelInfoGetAttributeArrayInt64 = 163,
  kSlotKernelContextGetGPUComputeStream = 193,
  kSlotKernelInfoGetConstantInputTensor = 249,
  kSlotKernelContextParallelFor = 274,
  kSlotGetTensorElementTypeAndShapeDataReference = 414,
};

using Api = const void* const;  // the table, by its first entry

using CreateStatus = Status* (*)(int code, const char* message);
using CreateCustomOpDomain = Status* (*)(const char* name, CustomOpDomain** domain);
using CustomOpDomainAdd = Status* (*)(CustomOpDomain* domain, const CustomOp* op);
using AddCustomOpDomain = Status* (*)(SessionOptions* options, CustomOpDomain* domain);
using GetTensorMutableData = Status* (*)(Value* value, void** data);
using KernelContextGetInput = Status* (*)(const KernelContext* context, size_t index, const Value** value);
using KernelContextGetOutput = Status* (*)(KernelContext* context, size_t index, const int64_t* sizes, size_t rank,
                                           Value** value);
using KernelInfoGetAttributeArrayInt64 = Status* (*)(const KernelInfo* info, const char* name, int64_t* values,
                                                     size_t* count);
using KernelInfoGetConstantInputTensor = Status* (*)(const KernelInfo* info, size_t index, int* is_constant,
                                                     const Value** value);
using KernelContextGetGPUComputeStream = Status* (*)(const KernelContext* context, void** stream);
using KernelContextParallelFor = Status* (*)(const KernelContext* context, void (*work)(void* data, size_t index),
                                             size_t total, size_t batches, void* data);
using GetTensorElementTypeAndShapeDataReference = Status* (*)(const Value* value, int* type, const int64_t** sizes,
                                                              size_t* rank);

// What RegisterCustomOps is given.
struct ApiBase {
  Api* (*get_api)(uint32_t version);  // null where the runtime is older
  const char* (*get_version)();
};

// An op as ONNX Runtime reads it. What may be null is.
struct CustomOp {
  uint32_t version;
  void* (*create_kernel)(const CustomOp*, Api*, const KernelInfo*);
  const char* (*name)(const CustomOp*);
  const char* (*execution_provider)(const CustomOp*);
  int (*input_type)(const CustomOp*, size_t);
  size_t (*input_count)(const CustomOp*);
  int (*output_type)(const CustomOp*, size_t);
  size_t (*output_count)(const CustomOp*);
  void (*compute)(void* kernel, KernelContext*);
  void (*destroy_kernel)(void* kernel);
  int (*input_characteristic)(const CustomOp*, size_t);
  int (*output_characteristic)(const CustomOp*, size_t);
  int (*input_memory)(const CustomOp*, size_t);
  int (*variadic_input_min)(const CustomOp*);
  int (*variadic_input_homogeneous)(const CustomOp*);
  int (*variadic_output_min)(const CustomOp*);
  int (*variadic_output_homogeneous)(const CustomOp*);
  Status* (*create_kernel_v2)(const CustomOp*, Api*, const KernelInfo*, void** kernel);
  Status* (*compute_v2)(void* kernel, KernelContext*);
  Status* (*infer_shape)(const CustomOp*, ShapeInferContext*);
  int (*start_version)(const CustomOp*);
  int (*end_version)(const CustomOp*);
  size_t (*may_inplace)(int** inputs, int** outputs);
  void (*release_may_inplace)(int* inputs, int* outputs);
  size_t (*alias_map)(int** inputs, int** outputs);
  void (*release_alias_map)(int* inputs, int* outputs);
};

}  // namespace ort

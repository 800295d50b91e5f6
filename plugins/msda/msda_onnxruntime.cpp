// ONNX Runtime's adapter: `RegisterCustomOps` brings msda::MSDeformAttn, version 1, in float and float16 to the CPU,
// and, compiled with MSDA_WITH_CUDA, to CUDA; and the convolutions of conv_onnxruntime.h.
//
// A call checks every shape before it touches memory and allocates nothing. On the CPU it shares the rows of the output
// among ONNX Runtime's own threads; on CUDA it queues one kernel on its stream and waits for nothing: spatial_shapes
// are asked for in the host's memory, where they are checked, and go to the kernel with its arguments. Version 1 is
// also what the function in the model file computes: this one only is faster.
#include <cstdarg>
#include <cstdio>
#include <mutex>

#include "../conv/conv_onnxruntime.h"
#include "msda.h"
#include "ort_calls.h"

namespace {

using ort::at;
using ort::Brackets;
using ort::Runtime;
using ort::Tensor;

enum Input : size_t { kValue, kSpatialShapes, kReferencePoints, kSamplingOffsets, kAttentionLogits, kInputs };
constexpr const char* kInputNames[kInputs] = {"value", "spatial_shapes", "reference_points", "sampling_offsets",
                                              "attention_logits"};
constexpr size_t kRanks[kInputs] = {4, 2, 4, 6, 4};
constexpr const char* kShapes[kInputs] = {"[N, S, M, D]", "[L, 2]", "[N, Lq, L, 2 or 4]", "[N, Lq, M, L, P, 2]",
                                          "[N, Lq, M, L*P]"};

__attribute__((format(printf, 2, 3))) ort::Status* invalid(const Runtime& runtime, const char* format, ...) {
  va_list values;
  va_start(values, format);
  ort::Status* status = ort::invalid(runtime, "MSDeformAttn", format, values);
  va_end(values);
  return status;
}

// What an input's elements are, where value's are `type`.
constexpr int element_type(size_t index, int type) {
  return index == kSpatialShapes ? ort::kInt64 : index == kReferencePoints ? ort::kFloat : type;
}

ort::Status* read_input(const Runtime& runtime, const ort::KernelContext* context, size_t index, int value_type,
                        Tensor* tensor) {
  const ort::Value* value = nullptr;
  if (ort::Status* failed = runtime.get_input(context, index, &value)) return failed;
  if (value == nullptr) return invalid(runtime, "%s is missing", kInputNames[index]);
  int type = 0;
  if (ort::Status* failed = runtime.get_shape(value, &type, &tensor->sizes, &tensor->rank)) return failed;
  const int wanted = element_type(index, value_type);
  if (type != wanted) return invalid(runtime, "%s has element type %d, not %d", kInputNames[index], type, wanted);
  if (tensor->rank != kRanks[index])
    return invalid(runtime, "%s must be %s, got %s", kInputNames[index], kShapes[index], Brackets(*tensor).text);
  void* data = nullptr;
  if (ort::Status* failed = runtime.get_data(const_cast<ort::Value*>(value), &data)) return failed;
  tensor->data = data;
  return nullptr;
}

// The rest of what read_input leaves unchecked: that the sizes agree. `wanted` has the rank of `tensor`.
ort::Status* check_sizes(const Runtime& runtime, size_t index, const Tensor& tensor, const int64_t* wanted) {
  for (size_t i = 0; i < tensor.rank; ++i)
    if (tensor.sizes[i] != wanted[i])
      return invalid(runtime, "%s must be %s, got %s", kInputNames[index], Brackets(wanted, tensor.rank).text,
                     Brackets(tensor).text);
  return nullptr;
}

ort::Status* check_levels(const Runtime& runtime, const MsdaParams& p) {
  int64_t total = 0;
  for (int64_t l = 0; l < p.levels; ++l) {
    const int64_t h = p.spatial_shapes[2 * l], w = p.spatial_shapes[2 * l + 1];
    if (h < 1 || w < 1)
      return invalid(runtime, "level %lld of spatial_shapes is %s, sides must be positive", static_cast<long long>(l),
                     Brackets(p.spatial_shapes + 2 * l, 2).text);
    if (h > p.pixels / w || (total += h * w) > p.pixels)  // as h * w > p.pixels, and cannot overflow
      return invalid(runtime, "level %lld of spatial_shapes, %s, reaches beyond the %lld pixels of value",
                     static_cast<long long>(l), Brackets(p.spatial_shapes + 2 * l, 2).text,
                     static_cast<long long>(p.pixels));
  }
  if (total < p.pixels)
    return invalid(runtime, "spatial_shapes cover %lld pixels, value has %lld", static_cast<long long>(total),
                   static_cast<long long>(p.pixels));
  return nullptr;
}

ort::Status* read_params(const Runtime& runtime, const ort::KernelContext* context, int type, MsdaParams* params) {
  Tensor in[kInputs];
  for (size_t i = 0; i < kInputs; ++i)
    if (ort::Status* failed = read_input(runtime, context, i, type, &in[i])) return failed;

  MsdaParams& p = *params;
  p.batch = in[kValue].sizes[0];
  p.pixels = in[kValue].sizes[1];
  p.heads = in[kValue].sizes[2];
  p.channels = in[kValue].sizes[3];
  p.queries = in[kSamplingOffsets].sizes[1];
  p.levels = in[kSpatialShapes].sizes[0];
  p.points = in[kSamplingOffsets].sizes[4];
  p.reference_dim = in[kReferencePoints].sizes[3] == 2 ? 2 : 4;
  p.type = type == ort::kFloat16 ? MSDA_FLOAT16 : MSDA_FLOAT32;
  p.value = in[kValue].data;
  p.spatial_shapes = static_cast<const int64_t*>(in[kSpatialShapes].data);
  p.reference_points = static_cast<const float*>(in[kReferencePoints].data);
  p.sampling_offsets = in[kSamplingOffsets].data;
  p.attention_logits = in[kAttentionLogits].data;

  if (p.levels < 1 || p.points < 1 || p.levels > MSDA_MAX_LEVEL_POINTS || p.points > MSDA_MAX_LEVEL_POINTS / p.levels)
    return invalid(runtime, "L=%lld levels of P=%lld points; L*P must be 1 to %d", static_cast<long long>(p.levels),
                   static_cast<long long>(p.points), MSDA_MAX_LEVEL_POINTS);
  if (in[kReferencePoints].sizes[3] != p.reference_dim)
    return invalid(runtime, "%s must be %s, got %s", kInputNames[kReferencePoints], kShapes[kReferencePoints],
                   Brackets(in[kReferencePoints]).text);

  const int64_t shapes[] = {p.levels, 2};
  const int64_t references[] = {p.batch, p.queries, p.levels, p.reference_dim};
  const int64_t offsets[] = {p.batch, p.queries, p.heads, p.levels, p.points, 2};
  const int64_t logits[] = {p.batch, p.queries, p.heads, p.levels * p.points};
  const int64_t* wanted[kInputs] = {in[kValue].sizes, shapes, references, offsets, logits};
  for (size_t i = 0; i < kInputs; ++i)
    if (ort::Status* failed = check_sizes(runtime, i, in[i], wanted[i])) return failed;
  return check_levels(runtime, p);
}

struct Work {
  MsdaParams params;
  void* output;
  int64_t rows, rows_per_block;
};

void do_block(void* data, size_t index) {
  const Work& work = *static_cast<const Work*>(data);
  const int64_t begin = static_cast<int64_t>(index) * work.rows_per_block, end = begin + work.rows_per_block;
  // read_params has refused what the kernel would.
  msda_forward_rows(&work.params, begin, end < work.rows ? end : work.rows, work.output);
}

// A node's: the functions of its runtime, and the type of its values.
struct Kernel {
  Runtime runtime;
  int type;
};

// The parameters of a call and the output's memory: null where the output has no elements.
ort::Status* prepare(const Kernel& kernel, ort::KernelContext* context, MsdaParams* params, void** output) {
  const Runtime& runtime = kernel.runtime;
  *output = nullptr;
  if (ort::Status* failed = read_params(runtime, context, kernel.type, params)) return failed;
  const int64_t sizes[] = {params->batch, params->queries, params->heads * params->channels};
  ort::Value* value = nullptr;
  if (ort::Status* failed = runtime.get_output(context, 0, sizes, 3, &value)) return failed;
  if (sizes[0] == 0 || sizes[1] == 0 || sizes[2] == 0) return nullptr;
  return runtime.get_data(value, output);
}

ort::Status* compute(void* kernel, ort::KernelContext* context) {
  const Runtime& runtime = static_cast<const Kernel*>(kernel)->runtime;
  Work work;
  MsdaParams& p = work.params;
  if (ort::Status* failed = prepare(*static_cast<const Kernel*>(kernel), context, &p, &work.output)) return failed;
  if (work.output == nullptr) return nullptr;

  work.rows = p.batch * p.queries;
  work.rows_per_block = msda_rows_per_block(&p);
  const int64_t blocks = (work.rows + work.rows_per_block - 1) / work.rows_per_block;
  if (blocks == 1) {
    do_block(&work, 0);
    return nullptr;
  }
  return runtime.parallel_for(context, do_block, static_cast<size_t>(blocks), 0, &work);
}

#ifdef MSDA_WITH_CUDA
ort::Status* compute_on_cuda(void* kernel, ort::KernelContext* context) {
  const Runtime& runtime = static_cast<const Kernel*>(kernel)->runtime;
  MsdaParams params;
  void *output = nullptr, *stream = nullptr;
  if (ort::Status* failed = prepare(*static_cast<const Kernel*>(kernel), context, &params, &output)) return failed;
  if (output == nullptr) return nullptr;
  if (ort::Status* failed = runtime.get_stream(context, &stream)) return failed;
  const int status = msda_forward_cuda_host_shapes(&params, output, stream);
  if (status == 0) return nullptr;
  char message[512];
  snprintf(message, sizeof(message), "MSDeformAttn: %s", msda_cuda_error(status));
  return runtime.create_status(ort::kFail, message);
}
#endif

// An op as ONNX Runtime reads it, and the type of its values: there is one of the same name for each.
struct TypedOp : ort::CustomOp {
  int type;
};

int type_of(const ort::CustomOp* op) { return static_cast<const TypedOp*>(op)->type; }

ort::Status* create_kernel(const ort::CustomOp* op, ort::Api* api, const ort::KernelInfo*, void** kernel) {
  *kernel = new Kernel{Runtime(api), type_of(op)};
  return nullptr;
}

TypedOp cpu_op(int type) {
  TypedOp op{};
  op.type = type;
  op.version = ort::kCustomOpVersion;
  op.name = [](const ort::CustomOp*) { return "MSDeformAttn"; };
  op.execution_provider = [](const ort::CustomOp*) { return "CPUExecutionProvider"; };
  op.input_count = [](const ort::CustomOp*) -> size_t { return kInputs; };
  op.input_type = [](const ort::CustomOp* self, size_t index) { return element_type(index, type_of(self)); };
  op.output_count = [](const ort::CustomOp*) -> size_t { return 1; };
  op.output_type = [](const ort::CustomOp* self, size_t) { return type_of(self); };
  op.input_characteristic = [](const ort::CustomOp*, size_t) { return ort::kRequired; };
  op.output_characteristic = [](const ort::CustomOp*, size_t) { return ort::kRequired; };
  op.input_memory = [](const ort::CustomOp*, size_t) { return ort::kDefaultMemory; };
  op.start_version = [](const ort::CustomOp*) { return 1; };
  op.end_version = [](const ort::CustomOp*) { return 1; };
  op.create_kernel_v2 = create_kernel;
  op.compute_v2 = compute;
  op.destroy_kernel = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  return op;
}

#ifdef MSDA_WITH_CUDA
TypedOp cuda_op(int type) {
  TypedOp op = cpu_op(type);
  op.execution_provider = [](const ort::CustomOp*) { return "CUDAExecutionProvider"; };
  op.input_memory = [](const ort::CustomOp*, size_t index) {
    return index == kSpatialShapes ? ort::kHostMemory : ort::kDefaultMemory;
  };
  op.compute_v2 = compute_on_cuda;
  return op;
}
#endif

// The domain that all sessions of the process share, made for the first of them. ONNX Runtime only points at it, and
// sessions may end after our own statics do, so that it is never released.
template <bool kWithConvs>
ort::Status* shared_domain(ort::Api* api, ort::CustomOpDomain** domain) {
  static const TypedOp ops[] = {
      cpu_op(ort::kFloat),
      cpu_op(ort::kFloat16),
#ifdef MSDA_WITH_CUDA
      cuda_op(ort::kFloat),
      cuda_op(ort::kFloat16),
#endif
  };
  static std::mutex making;
  static ort::CustomOpDomain* shared = nullptr;
  const std::lock_guard<std::mutex> alone(making);
  if (shared == nullptr) {
    ort::CustomOpDomain* made = nullptr;
    const auto create = at<ort::CreateCustomOpDomain>(api, ort::kSlotCreateCustomOpDomain);
    if (ort::Status* failed = create("msda", &made)) return failed;
    const auto add = at<ort::CustomOpDomainAdd>(api, ort::kSlotCustomOpDomainAdd);
    for (const TypedOp& op : ops)
      if (ort::Status* failed = add(made, &op)) return failed;
    for (size_t i = 0; const ort::CustomOp* op = kWithConvs ? conv_op(i) : nullptr; ++i)
      if (ort::Status* failed = add(made, op)) return failed;
    shared = made;
  }
  *domain = shared;
  return nullptr;
}

thread_local bool for_cuda = false;

}  // namespace

// Whether what this thread registers is for sessions on CUDA. The convolutions have no kernel there, and ONNX Runtime
// would carry every one to the CPU and back; left out, they are the functions that the model's file has of them.
extern "C" __attribute__((visibility("default"))) void msda_register_for_cuda(int on) { for_cuda = on != 0; }

extern "C" __attribute__((visibility("default"))) ort::Status* RegisterCustomOps(ort::SessionOptions* options,
                                                                                 const ort::ApiBase* base) {
  ort::Api* api = base->get_api(ort::kApiVersion);
  if (api == nullptr) {
    char message[128];
    snprintf(message, sizeof(message), "MSDeformAttn: ONNX Runtime %.32s is too old, 1.%u or newer is needed",
             base->get_version(), ort::kApiVersion);
    const auto create_status = at<ort::CreateStatus>(base->get_api(ort::kFirstApiVersion), ort::kSlotCreateStatus);
    return create_status(ort::kInvalidArgument, message);
  }
  ort::CustomOpDomain* domain = nullptr;
  const auto share = for_cuda ? shared_domain<false> : shared_domain<true>;
  if (ort::Status* failed = share(api, &domain)) return failed;
  return at<ort::AddCustomOpDomain>(api, ort::kSlotAddCustomOpDomain)(options, domain);
}

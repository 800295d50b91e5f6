// Convolutions and linear layers as ops of ONNX Runtime. Their weights must be constants: where the kernel wants them
// transformed, that is done when a session is made. A call checks every shape before it touches memory, and shares its
// work among ONNX Runtime's own threads.
#include "conv_onnxruntime.h"

#include <algorithm>
#include <cstdarg>
#include <cstdlib>
#include <memory>

#include "../msda/ort_calls.h"
#include "conv.h"

namespace {

enum Input : size_t { kX, kWeight, kBias, kShortcut, kInputs };
constexpr const char* kInputNames[kInputs] = {"x", "weight", "bias", "shortcut"};
constexpr size_t kAnyRank = 0;

// What inputs of a kind of layer look like.
struct Layer {
  size_t ranks[kInputs];
  const char* shapes[kInputs];
};
constexpr Layer kConv = {{4, 5, 1, 4}, {"[N, H, W, C]", "[K/32, R, S, C, 32]", "[K]", "[N, OH, OW, K]"}};
constexpr Layer kLinear = {{kAnyRank, 3, 1, kAnyRank}, {"[..., C]", "[K/32, C, 32]", "[K]", "[..., K]"}};

struct ConvOp : ort::CustomOp {
  const char* called;
  const Layer* layer;
  bool adds, relu;
};

const ConvOp& conv_of(const ort::CustomOp* op) { return *static_cast<const ConvOp*>(op); }

struct Free {
  void operator()(float* memory) const { std::free(memory); }
};

// A node's.
struct Kernel {
  const ConvOp& op;
  ort::Runtime runtime;
  ConvParams params{};  // what all calls have in common
  std::unique_ptr<float, Free> transformed;

  Kernel(const ConvOp& op, ort::Api* api) : op(op), runtime(api) {}
};

__attribute__((format(printf, 2, 3))) ort::Status* invalid(const Kernel& kernel, const char* format, ...) {
  va_list values;
  va_start(values, format);
  ort::Status* status = ort::invalid(kernel.runtime, kernel.op.called, format, values);
  va_end(values);
  return status;
}

ort::Status* read_tensor(const Kernel& kernel, size_t index, const ort::Value* value, ort::Tensor* tensor) {
  const ort::Runtime& runtime = kernel.runtime;
  if (value == nullptr) return invalid(kernel, "%s is missing", kInputNames[index]);
  int type = 0;
  if (ort::Status* failed = runtime.get_shape(value, &type, &tensor->sizes, &tensor->rank)) return failed;
  if (type != ort::kFloat)
    return invalid(kernel, "%s has element type %d, not %d", kInputNames[index], type, ort::kFloat);
  const Layer& layer = *kernel.op.layer;
  const size_t rank = layer.ranks[index];
  if (rank == kAnyRank ? tensor->rank < 1 || tensor->rank > ort::kMaxRank : tensor->rank != rank)
    return invalid(kernel, "%s must be %s, got %s", kInputNames[index], layer.shapes[index],
                   ort::Brackets(*tensor).text);
  void* data = nullptr;
  if (ort::Status* failed = runtime.get_data(const_cast<ort::Value*>(value), &data)) return failed;
  tensor->data = data;
  return nullptr;
}

ort::Status* check_sizes(const Kernel& kernel, size_t index, const ort::Tensor& tensor, const int64_t* wanted,
                         size_t rank) {
  if (tensor.rank == rank && std::equal(wanted, wanted + rank, tensor.sizes)) return nullptr;
  return invalid(kernel, "%s must be %s, got %s", kInputNames[index], ort::Brackets(wanted, rank).text,
                 ort::Brackets(tensor).text);
}

template <size_t Count>
ort::Status* read_numbers(const Kernel& kernel, ort::Api* api, const ort::KernelInfo* info, const char* name,
                          int64_t (&numbers)[Count]) {
  const auto read = ort::at<ort::KernelInfoGetAttributeArrayInt64>(api, ort::kSlotKernelInfoGetAttributeArrayInt64);
  size_t count = 0;
  if (ort::Status* failed = read(info, name, nullptr, &count)) return failed;
  if (count != Count) return invalid(kernel, "%s must be %zu numbers, are %zu", name, Count, count);
  return read(info, name, numbers, &count);
}

// What a node says once and for all: its window and its weights. A linear layer is a window of one pixel.
ort::Status* read_node(Kernel& kernel, ort::Api* api, const ort::KernelInfo* info) {
  ConvParams& p = kernel.params;
  const bool linear = kernel.op.layer == &kLinear;
  int64_t strides[2] = {1, 1}, dilations[2] = {1, 1}, pads[4] = {};
  if (!linear) {
    if (ort::Status* failed = read_numbers(kernel, api, info, "strides", strides)) return failed;
    if (ort::Status* failed = read_numbers(kernel, api, info, "dilations", dilations)) return failed;
    if (ort::Status* failed = read_numbers(kernel, api, info, "pads", pads)) return failed;
  }
  const auto read = ort::at<ort::KernelInfoGetConstantInputTensor>(api, ort::kSlotKernelInfoGetConstantInputTensor);
  int is_constant = 0;
  const ort::Value* value = nullptr;
  if (ort::Status* failed = read(info, kWeight, &is_constant, &value)) return failed;
  if (is_constant == 0) return invalid(kernel, "%s must be a constant of the model", kInputNames[kWeight]);
  ort::Tensor weight;
  if (ort::Status* failed = read_tensor(kernel, kWeight, value, &weight)) return failed;
  const int64_t* sizes = weight.sizes;
  const int64_t height = linear ? 1 : sizes[1], width = linear ? 1 : sizes[2], lanes = sizes[weight.rank - 1];
  p.window = {height, width, strides[0], strides[1], dilations[0], dilations[1], pads[0], pads[1], pads[2], pads[3]};
  p.in_channels = sizes[weight.rank - 2];
  p.out_channels = sizes[0] * lanes;
  if (lanes != CONV_LANES || conv_servable(p.in_channels, p.out_channels, &p.window) != 0)
    return invalid(kernel,
                   "%s must be %s with C a multiple of %d, at most %d, got %s; strides and dilations positive, "
                   "pads not negative",
                   kInputNames[kWeight], kernel.op.layer->shapes[kWeight], CONV_CHANNELS, CONV_MAX_CHANNELS,
                   ort::Brackets(weight).text);
  p.relu = kernel.op.relu;
  p.weight = static_cast<const float*>(weight.data);
  if (const int64_t count = conv_winograd_floats(p.in_channels, p.out_channels, &p.window)) {
    kernel.transformed.reset(static_cast<float*>(std::aligned_alloc(64, count * sizeof(float))));
    if (kernel.transformed == nullptr)
      return invalid(kernel, "no memory for %lld weights", static_cast<long long>(count));
    conv_winograd(p.in_channels, p.out_channels, p.weight, kernel.transformed.get());
    p.weight = kernel.transformed.get();
  }
  return nullptr;
}

ort::Status* create_kernel(const ort::CustomOp* op, ort::Api* api, const ort::KernelInfo* info, void** kernel) {
  auto made = std::make_unique<Kernel>(conv_of(op), api);
  if (ort::Status* failed = read_node(*made, api, info)) return failed;
  *kernel = made.release();
  return nullptr;
}

// ONNX Runtime's threads, for one call.
struct Threads {
  const ort::Runtime& runtime;
  const ort::KernelContext* context;
  ort::Status* failed = nullptr;
};

void for_each(void* caller, void (*work)(void* data, size_t index), size_t count, void* data) {
  Threads& threads = *static_cast<Threads*>(caller);
  if (threads.failed != nullptr) return;
  if (count == 1) return work(data, 0);
  threads.failed = threads.runtime.parallel_for(threads.context, work, count, 0, data);
}

ort::Status* compute(void* node, ort::KernelContext* context) {
  const Kernel& kernel = *static_cast<const Kernel*>(node);
  const ort::Runtime& runtime = kernel.runtime;
  ort::Tensor in[kInputs];
  for (size_t i = 0; i < (kernel.op.adds ? kInputs : kShortcut); ++i) {
    if (i == kWeight) continue;
    const ort::Value* value = nullptr;
    if (ort::Status* failed = runtime.get_input(context, i, &value)) return failed;
    if (ort::Status* failed = read_tensor(kernel, i, value, &in[i])) return failed;
  }
  ConvParams p = kernel.params;
  const size_t rank = in[kX].rank;
  int64_t wanted[ort::kMaxRank], output[ort::kMaxRank];
  std::copy_n(in[kX].sizes, rank, wanted);
  wanted[rank - 1] = p.in_channels;
  if (ort::Status* failed = check_sizes(kernel, kX, in[kX], wanted, rank)) return failed;
  if (ort::Status* failed = check_sizes(kernel, kBias, in[kBias], &p.out_channels, 1)) return failed;
  std::copy_n(wanted, rank, output);
  output[rank - 1] = p.out_channels;
  p.batch = p.height = p.width = 1;
  if (kernel.op.layer == &kLinear) {
    for (size_t i = 0; i + 1 < rank; ++i) p.width *= wanted[i];
  } else {
    p.batch = wanted[0];
    p.height = wanted[1];
    p.width = wanted[2];
    output[1] = conv_out_height(&p);
    output[2] = conv_out_width(&p);
    const ConvWindow& w = p.window;
    const int64_t pads[] = {w.pad_top, w.pad_left, w.pad_bottom, w.pad_right};
    const int64_t reach[] = {w.dilation_h * (w.height - 1) + 1, w.dilation_w * (w.width - 1) + 1};
    if (output[1] < 1 || output[2] < 1)
      return invalid(kernel, "%s, %s, has no room with pads %s for a window that reaches over %s pixels",
                     kInputNames[kX], ort::Brackets(in[kX]).text, ort::Brackets(pads, 4).text,
                     ort::Brackets(reach, 2).text);
  }
  if (kernel.op.adds)
    if (ort::Status* failed = check_sizes(kernel, kShortcut, in[kShortcut], output, rank)) return failed;

  ort::Value* value = nullptr;
  if (ort::Status* failed = runtime.get_output(context, 0, output, rank, &value)) return failed;
  if (std::find(output, output + rank, 0) != output + rank) return nullptr;
  void* data = nullptr;
  if (ort::Status* failed = runtime.get_data(value, &data)) return failed;
  p.input = static_cast<const float*>(in[kX].data);
  p.bias = static_cast<const float*>(in[kBias].data);
  p.shortcut = kernel.op.adds ? static_cast<const float*>(in[kShortcut].data) : nullptr;
  p.output = static_cast<float*>(data);
  Threads threads{runtime, context};
  const int status = conv_forward(&p, for_each, &threads);
  if (threads.failed != nullptr) return threads.failed;
  return status == 0 ? nullptr : invalid(kernel, "no memory to work in");
}

ConvOp make(const char* name, const Layer& layer, bool adds, bool relu) {
  ConvOp op{};
  op.called = name;
  op.layer = &layer;
  op.adds = adds;
  op.relu = relu;
  op.version = ort::kCustomOpVersion;
  op.name = [](const ort::CustomOp* self) { return conv_of(self).called; };
  op.execution_provider = [](const ort::CustomOp*) { return "CPUExecutionProvider"; };
  op.input_count = [](const ort::CustomOp* self) -> size_t { return conv_of(self).adds ? kInputs : kShortcut; };
  op.input_type = [](const ort::CustomOp*, size_t) { return ort::kFloat; };
  op.output_count = [](const ort::CustomOp*) -> size_t { return 1; };
  op.output_type = [](const ort::CustomOp*, size_t) { return ort::kFloat; };
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

}  // namespace

const ort::CustomOp* conv_op(size_t index) {
  static const ConvOp ops[] = {
      make("NhwcConv", kConv, false, false),   make("NhwcConvRelu", kConv, false, true),
      make("NhwcConvAdd", kConv, true, false), make("NhwcConvAddRelu", kConv, true, true),
      make("Linear", kLinear, false, false),   make("LinearRelu", kLinear, false, true),
      make("LinearAdd", kLinear, true, false), make("LinearAddRelu", kLinear, true, true),
  };
  return index < sizeof(ops) / sizeof(ops[0]) ? &ops[index] : nullptr;
}

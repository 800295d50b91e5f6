// TensorRT's adapter: msda::MSDeformAttn, version 1, as an IPluginV3 for TensorRT 10, TensorRT 11 and TensorRT-RTX.
//
// `IPluginRegistry::loadLibrary` finds `getCreators` and `setLoggerFinder` here; nothing of TensorRT is linked, and the
// registry is never called from this side (TensorRT 11 took functions out of its table). A plugin has no state: what it
// needs to know, every call tells it.
#include <NvInferRuntime.h>
#include <cxxabi.h>

#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <new>

#include "msda.h"

namespace {

namespace trt = nvinfer1;

constexpr const char* kName = "MSDeformAttn";
constexpr const char* kVersion = "1";

// --- what the inputs are ---

enum Input : int32_t { kValue, kSpatialShapes, kReferencePoints, kSamplingOffsets, kAttentionLogits, kInputs };
constexpr const char* kInputNames[kInputs] = {"value", "spatial_shapes", "reference_points", "sampling_offsets",
                                              "attention_logits"};
constexpr int32_t kRanks[kInputs] = {4, 2, 4, 6, 4};
constexpr const char* kShapes[kInputs] = {"[N, S, M, D]", "[L, 2]", "[N, Lq, L, 2 or 4]", "[N, Lq, M, L, P, 2]",
                                          "[N, Lq, M, L*P]"};
constexpr const char* kTypes[kInputs] = {"float or half", "int64", "float", "of value's type", "of value's type"};

// --- the logger ---

std::atomic<trt::ILoggerFinder*> logger_finder{nullptr};

// Since TensorRT 11, ILoggerFinder and ILogger derive from IVersionedInterface, which puts four functions before their
// own one (language, interface, two destructors). One library serves both, so the object itself is asked: the root of
// its class tells. Compare NvInferRuntime.h of 10.16 and of 11.0.
constexpr const char* kRootBefore11 = "N8nvinfer113ILoggerFinderE";
constexpr const char* kRootSince11 = "N8nvinfer119IVersionedInterfaceE";
constexpr int kFirstBefore11 = 0, kFirstSince11 = 4;
constexpr int kUnknown = -1;

template <typename Function>
Function virtual_function(const void* object, int slot) {
  return reinterpret_cast<Function>((*static_cast<void* const* const*>(object))[slot]);
}

// Which slot holds findLogger, and then log; kUnknown for a class never seen.
int first_own_function(const void* finder) {
  const auto* type = virtual_function<const std::type_info*>(finder, -1);  // by the C++ ABI; null without RTTI
  if (type == nullptr) return kUnknown;
  while (const auto* derived = dynamic_cast<const abi::__si_class_type_info*>(type)) type = derived->__base_type;
  if (strcmp(type->name(), kRootBefore11) == 0) return kFirstBefore11;
  if (strcmp(type->name(), kRootSince11) == 0) return kFirstSince11;
  return kUnknown;
}

void log_error(const char* message) {
  using FindLogger = trt::ILogger* (*)(trt::ILoggerFinder*);
  using Log = void (*)(trt::ILogger*, trt::ILogger::Severity, const char*);
  trt::ILoggerFinder* finder = logger_finder.load();
  const int slot = finder == nullptr ? kUnknown : first_own_function(finder);
  trt::ILogger* logger = slot == kUnknown ? nullptr : virtual_function<FindLogger>(finder, slot)(finder);
  if (logger != nullptr) virtual_function<Log>(logger, slot)(logger, trt::ILogger::Severity::kERROR, message);
  else fprintf(stderr, "%s\n", message);
}

// Logs, and is the status of a call that failed.
__attribute__((format(printf, 1, 2))) int32_t refuse(const char* format, ...) {
  char message[512];
  const int head = snprintf(message, sizeof(message), "%s: ", kName);
  va_list values;
  va_start(values, format);
  vsnprintf(message + head, sizeof(message) - head, format, values);
  va_end(values);
  log_error(message);
  return -1;
}

// "[2, ?, 4]"
struct Brackets {
  char text[24 * trt::Dims::MAX_DIMS];

  explicit Brackets(const trt::Dims& dims) {
    size_t length = snprintf(text, sizeof(text), "[");
    for (int32_t i = 0; i < dims.nbDims; ++i) {
      length += snprintf(text + length, sizeof(text) - length, i ? ", " : "");
      length += dims.d[i] < 0
                    ? snprintf(text + length, sizeof(text) - length, "?")
                    : snprintf(text + length, sizeof(text) - length, "%lld", static_cast<long long>(dims.d[i]));
    }
    snprintf(text + length, sizeof(text) - length, "]");
  }
};

const char* type_name(trt::DataType type) {
  constexpr const char* kNames[] = {"float", "half", "int8", "int32", "bool", "uint8", "fp8", "bfloat16", "int64"};
  const auto index = static_cast<size_t>(type);
  return index < sizeof(kNames) / sizeof(kNames[0]) ? kNames[index] : "another type";
}

// --- shapes and types ---

bool differ(const trt::Dims& wanted, const trt::Dims& got) {
  for (int32_t i = 0; i < got.nbDims; ++i)
    if (wanted.d[i] >= 0 && got.d[i] >= 0 && wanted.d[i] != got.d[i]) return true;
  return false;
}

// The parameters' sizes; in shapes and in them -1 is a size that is not known yet. Refuses shapes that do not agree.
int32_t read_sizes(const trt::Dims (&shapes)[kInputs], MsdaParams* params) {
  for (int32_t i = 0; i < kInputs; ++i)
    if (shapes[i].nbDims != kRanks[i])
      return refuse("%s must be %s, got %s", kInputNames[i], kShapes[i], Brackets(shapes[i]).text);

  MsdaParams& p = *params;
  p.batch = shapes[kValue].d[0];
  p.pixels = shapes[kValue].d[1];
  p.heads = shapes[kValue].d[2];
  p.channels = shapes[kValue].d[3];
  p.queries = shapes[kSamplingOffsets].d[1];
  p.levels = shapes[kSpatialShapes].d[0];
  p.points = shapes[kSamplingOffsets].d[4];
  p.reference_dim = shapes[kReferencePoints].d[3];

  const bool counted = p.levels >= 0 && p.points >= 0;
  if (p.levels == 0 || p.points == 0 || p.levels > MSDA_MAX_LEVEL_POINTS || p.points > MSDA_MAX_LEVEL_POINTS ||
      (counted && p.levels * p.points > MSDA_MAX_LEVEL_POINTS))
    return refuse("L=%lld levels of P=%lld points; L*P must be 1 to %d", static_cast<long long>(p.levels),
                  static_cast<long long>(p.points), MSDA_MAX_LEVEL_POINTS);
  if (p.reference_dim >= 0 && p.reference_dim != 2 && p.reference_dim != 4)
    return refuse("%s must be %s, got %s", kInputNames[kReferencePoints], kShapes[kReferencePoints],
                  Brackets(shapes[kReferencePoints]).text);

  const int64_t level_points = counted ? p.levels * p.points : -1;
  const trt::Dims wanted[kInputs] = {
      shapes[kValue],
      {2, {p.levels, 2}},
      {4, {p.batch, p.queries, p.levels, p.reference_dim}},
      {6, {p.batch, p.queries, p.heads, p.levels, p.points, 2}},
      {4, {p.batch, p.queries, p.heads, level_points}},
  };
  for (int32_t i = 0; i < kInputs; ++i)
    if (differ(wanted[i], shapes[i]))
      return refuse("%s must be %s, got %s", kInputNames[i], Brackets(wanted[i]).text, Brackets(shapes[i]).text);
  return 0;
}

int32_t read_sizes(const trt::PluginTensorDesc* inputs, MsdaParams* params) {
  trt::Dims shapes[kInputs];
  for (int32_t i = 0; i < kInputs; ++i) shapes[i] = inputs[i].dims;
  return read_sizes(shapes, params);
}

// Whether input `index` may be of this type, beside a value of that type.
bool serves(int32_t index, trt::DataType type, trt::DataType value) {
  switch (index) {
    case kValue: return type == trt::DataType::kFLOAT || type == trt::DataType::kHALF;
    case kSpatialShapes: return type == trt::DataType::kINT64;
    case kReferencePoints: return type == trt::DataType::kFLOAT;
    default: return type == value;
  }
}

constexpr trt::PluginFieldCollection kNoFields{0, nullptr};

// --- the plugin ---

class Plugin final : public trt::IPluginV3,
                     public trt::IPluginV3OneCore,
                     public trt::IPluginV3OneBuild,
                     public trt::IPluginV3OneRuntime {
 public:
  // An engine finds its plugins again by name, version and namespace: those of the creator that the parser found.
  explicit Plugin(const char* plugin_namespace) : namespace_(plugin_namespace) {}

  trt::IPluginCapability* getCapabilityInterface(trt::PluginCapabilityType type) noexcept override {
    switch (type) {
      case trt::PluginCapabilityType::kCORE: return static_cast<trt::IPluginV3OneCore*>(this);
      case trt::PluginCapabilityType::kBUILD: return static_cast<trt::IPluginV3OneBuild*>(this);
      case trt::PluginCapabilityType::kRUNTIME: return static_cast<trt::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
  }
  trt::IPluginV3* clone() noexcept override { return new (std::nothrow) Plugin(namespace_); }

  // Core
  const char* getPluginName() const noexcept override { return kName; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return namespace_; }

  // Build
  int32_t getNbOutputs() const noexcept override { return 1; }

  int32_t getOutputDataTypes(trt::DataType* outputs, int32_t, const trt::DataType* inputs,
                             int32_t count) const noexcept override {
    if (count != kInputs) return refuse("%d inputs, there must be %d", count, kInputs);
    for (int32_t i = 0; i < kInputs; ++i)
      if (!serves(i, inputs[i], inputs[kValue]))
        return refuse("%s must be %s, is %s", kInputNames[i], kTypes[i], type_name(inputs[i]));
    outputs[0] = inputs[kValue];
    return 0;
  }

  int32_t getOutputShapes(const trt::DimsExprs* inputs, int32_t count, const trt::DimsExprs*, int32_t,
                          trt::DimsExprs* outputs, int32_t, trt::IExprBuilder& expressions) noexcept override {
    if (count != kInputs) return refuse("%d inputs, there must be %d", count, kInputs);
    trt::Dims shapes[kInputs];
    for (int32_t i = 0; i < kInputs; ++i) {
      shapes[i].nbDims = inputs[i].nbDims;
      for (int32_t k = 0; k < inputs[i].nbDims; ++k)
        shapes[i].d[k] = inputs[i].d[k]->isConstant() ? inputs[i].d[k]->getConstantValue() : -1;
    }
    MsdaParams params{};
    if (const int32_t failed = read_sizes(shapes, &params)) return failed;
    const trt::DimsExprs &value = inputs[kValue], &offsets = inputs[kSamplingOffsets];
    outputs[0].nbDims = 3;  // [N, Lq, M*D]
    outputs[0].d[0] = value.d[0];
    outputs[0].d[1] = offsets.d[1];
    outputs[0].d[2] = expressions.operation(trt::DimensionOperation::kPROD, *value.d[2], *value.d[3]);
    return 0;
  }

  bool supportsFormatCombination(int32_t position, const trt::DynamicPluginTensorDesc* tensors, int32_t,
                                 int32_t) noexcept override {
    const trt::PluginTensorDesc& tensor = tensors[position].desc;
    return tensor.format == trt::TensorFormat::kLINEAR && serves(position, tensor.type, tensors[kValue].desc.type);
  }

  int32_t configurePlugin(const trt::DynamicPluginTensorDesc* inputs, int32_t count,
                          const trt::DynamicPluginTensorDesc*, int32_t) noexcept override {
    if (count != kInputs) return refuse("%d inputs, there must be %d", count, kInputs);
    trt::Dims shapes[kInputs];
    for (int32_t i = 0; i < kInputs; ++i) shapes[i] = inputs[i].desc.dims;
    MsdaParams params{};
    return read_sizes(shapes, &params);
  }

  // Runtime
  int32_t onShapeChange(const trt::PluginTensorDesc* inputs, int32_t count, const trt::PluginTensorDesc*,
                        int32_t) noexcept override {
    if (count != kInputs) return refuse("%d inputs, there must be %d", count, kInputs);
    MsdaParams params{};
    return read_sizes(inputs, &params);
  }

  int32_t enqueue(const trt::PluginTensorDesc* descriptions, const trt::PluginTensorDesc*, const void* const* inputs,
                  void* const* outputs, void*, cudaStream_t stream) noexcept override {
    MsdaParams params{};
    if (const int32_t failed = read_sizes(descriptions, &params)) return failed;
    if (params.batch == 0 || params.queries == 0 || params.heads == 0 || params.channels == 0) return 0;
    params.type = descriptions[kValue].type == trt::DataType::kHALF ? MSDA_FLOAT16 : MSDA_FLOAT32;
    params.value = inputs[kValue];
    params.spatial_shapes = static_cast<const int64_t*>(inputs[kSpatialShapes]);
    params.reference_points = static_cast<const float*>(inputs[kReferencePoints]);
    params.sampling_offsets = inputs[kSamplingOffsets];
    params.attention_logits = inputs[kAttentionLogits];
    const int status = msda_forward_cuda(&params, outputs[0], stream);
    if (status != 0)
      refuse("%s, with value %s %s and sampling_offsets %s", msda_cuda_error(status),
             type_name(descriptions[kValue].type), Brackets(descriptions[kValue].dims).text,
             Brackets(descriptions[kSamplingOffsets].dims).text);
    return status;
  }

  trt::IPluginV3* attachToContext(trt::IPluginResourceContext*) noexcept override { return clone(); }
  const trt::PluginFieldCollection* getFieldsToSerialize() noexcept override { return &kNoFields; }

 private:
  const char* namespace_;  // a literal
};

class Creator final : public trt::IPluginCreatorV3One {
 public:
  explicit Creator(const char* plugin_namespace) : namespace_(plugin_namespace) {}

  trt::IPluginV3* createPlugin(const char*, const trt::PluginFieldCollection*, trt::TensorRTPhase) noexcept override {
    return new (std::nothrow) Plugin(namespace_);
  }
  const trt::PluginFieldCollection* getFieldNames() noexcept override { return &kNoFields; }
  const char* getPluginName() const noexcept override { return kName; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return namespace_; }

 private:
  const char* namespace_;  // a literal
};

}  // namespace

extern "C" {

// Some parsers look in the namespace "" only, others in the node's domain first.
__attribute__((visibility("default"))) trt::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  // Never freed: the registry may outlive this library's statics.
  static trt::IPluginCreatorInterface* const creators[] = {new Creator(""), new Creator("msda")};
  count = sizeof(creators) / sizeof(creators[0]);
  return creators;
}

__attribute__((visibility("default"))) void setLoggerFinder(trt::ILoggerFinder* finder) { logger_finder = finder; }

}  // extern "C"

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
enum Axis : int32_t { kN, kS, kM, kD, kLq, kL, kP, kR, kLP, kTwo, kAxes };

constexpr const char* kAxisNames[kAxes] = {"N", "S", "M", "D", "Lq", "L", "P", "R", "L*P", "the last axis"};

struct InputRule {
  const char* name;
  const char* shape;
  int32_t rank;
  Axis axes[6];
};

constexpr InputRule kRules[kInputs] = {
    {"value", "[N, S, M, D]", 4, {kN, kS, kM, kD}},
    {"spatial_shapes", "[L, 2]", 2, {kL, kTwo}},
    {"reference_points", "[N, Lq, L, 2 or 4]", 4, {kN, kLq, kL, kR}},
    {"sampling_offsets", "[N, Lq, M, L, P, 2]", 6, {kN, kLq, kM, kL, kP, kTwo}},
    {"attention_logits", "[N, Lq, M, L*P]", 4, {kN, kLq, kM, kLP}},
};

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
      length += dims.d[i] < 0 ? snprintf(text + length, sizeof(text) - length, "?")
                              : snprintf(text + length, sizeof(text) - length, "%lld", (long long)dims.d[i]);
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

// The size of every axis; -1 where it is not known yet.
struct Sizes {
  int64_t of[kAxes];
};

// The axes' sizes, as far as the shapes tell (-1 in a shape: any). Refuses those that do not agree, naming the first.
int32_t read_sizes(const trt::Dims (&shapes)[kInputs], Sizes* sizes) {
  int64_t* const of = sizes->of;
  const char* told_by[kAxes] = {};
  for (int64_t& size : sizes->of) size = -1;
  for (int32_t i = 0; i < kInputs; ++i) {
    const InputRule& rule = kRules[i];
    if (shapes[i].nbDims != rule.rank)
      return refuse("%s must be %s, got %s", rule.name, rule.shape, Brackets(shapes[i]).text);
    for (int32_t k = 0; k < rule.rank; ++k) {
      const Axis axis = rule.axes[k];
      const int64_t size = shapes[i].d[k];
      if (size < 0) continue;
      if (axis == kTwo ? size != 2 : axis == kR && size != 2 && size != 4)
        return refuse("%s must be %s, got %s", rule.name, rule.shape, Brackets(shapes[i]).text);
      if (told_by[axis] != nullptr && of[axis] != size)
        return refuse("%s is %s, but %s of %s is %lld, by %s", rule.name, Brackets(shapes[i]).text, kAxisNames[axis],
                      rule.shape, (long long)of[axis], told_by[axis]);
      if (told_by[axis] == nullptr) told_by[axis] = rule.name;
      of[axis] = size;
    }
  }
  if (of[kL] == 0 || of[kP] == 0 || of[kL] > MSDA_MAX_LEVEL_POINTS || of[kP] > MSDA_MAX_LEVEL_POINTS ||
      (of[kL] > 0 && of[kP] > 0 && of[kL] * of[kP] > MSDA_MAX_LEVEL_POINTS))
    return refuse("sampling_offsets are %s: L*P must be 1 to %d", Brackets(shapes[kSamplingOffsets]).text,
                  MSDA_MAX_LEVEL_POINTS);
  if (of[kL] > 0 && of[kP] > 0 && of[kLP] >= 0 && of[kL] * of[kP] != of[kLP])
    return refuse("attention_logits are %s, but L*P of %s is %lld, by sampling_offsets",
                  Brackets(shapes[kAttentionLogits]).text, kRules[kAttentionLogits].shape,
                  (long long)(of[kL] * of[kP]));
  return 0;
}

int32_t read_sizes(const trt::PluginTensorDesc* inputs, Sizes* sizes) {
  trt::Dims shapes[kInputs];
  for (int32_t i = 0; i < kInputs; ++i) shapes[i] = inputs[i].dims;
  return read_sizes(shapes, sizes);
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
        return refuse("%s is %s beside a value of type %s", kRules[i].name, type_name(inputs[i]),
                      type_name(inputs[kValue]));
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
    Sizes sizes;
    if (const int32_t failed = read_sizes(shapes, &sizes)) return failed;
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
    Sizes sizes;
    return read_sizes(shapes, &sizes);
  }

  // Runtime
  int32_t onShapeChange(const trt::PluginTensorDesc* inputs, int32_t count, const trt::PluginTensorDesc*,
                        int32_t) noexcept override {
    if (count != kInputs) return refuse("%d inputs, there must be %d", count, kInputs);
    Sizes sizes;
    return read_sizes(inputs, &sizes);
  }

  int32_t enqueue(const trt::PluginTensorDesc* descriptions, const trt::PluginTensorDesc*, const void* const* inputs,
                  void* const* outputs, void*, cudaStream_t stream) noexcept override {
    Sizes sizes;
    if (const int32_t failed = read_sizes(descriptions, &sizes)) return failed;
    const int64_t* const of = sizes.of;
    if (of[kN] == 0 || of[kLq] == 0 || of[kM] == 0 || of[kD] == 0) return 0;

    MsdaParams params{};
    params.batch = of[kN];
    params.pixels = of[kS];
    params.heads = of[kM];
    params.channels = of[kD];
    params.queries = of[kLq];
    params.levels = of[kL];
    params.points = of[kP];
    params.reference_dim = of[kR];
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

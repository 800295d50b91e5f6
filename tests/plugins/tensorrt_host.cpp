// Plays TensorRT for the tests: hands the plugin's library a logger of the headers' own layout, and calls a plugin as
// an engine that runs does. It needs neither TensorRT's library nor a GPU.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstring>
#include <string>

namespace {

namespace trt = nvinfer1;

constexpr int kTensors = 6;  // the op's five inputs and its output
constexpr int kRank = 6;

std::string logged;

class Logger final : public trt::ILogger {
  void log(Severity severity, const char* message) noexcept override {
    if (severity <= Severity::kERROR) logged += std::string(message) + "\n";
  }
} logger;

class Finder final : public trt::ILoggerFinder {
 public:
  trt::ILogger* findLogger() override { return &logger; }
} finder;

void* library = nullptr;
trt::IPluginCreatorInterface* const* creators = nullptr;
int32_t creator_count = 0;
trt::IPluginV3* plugin = nullptr;

trt::IPluginCreatorV3One* creator(int index) { return static_cast<trt::IPluginCreatorV3One*>(creators[index]); }

template <typename Capability>
Capability* capability(trt::PluginCapabilityType type) {
  return static_cast<Capability*>(plugin->getCapabilityInterface(type));
}

// sizes: [kTensors, kRank]; ranks, types, formats: [kTensors]
void describe(const int64_t* sizes, const int32_t* ranks, const int32_t* types, const int32_t* formats,
              trt::PluginTensorDesc* tensors) {
  for (int i = 0; i < kTensors; ++i) {
    tensors[i] = {};
    tensors[i].dims.nbDims = ranks[i];
    for (int k = 0; k < ranks[i] && k < kRank; ++k) tensors[i].dims.d[k] = sizes[i * kRank + k];
    tensors[i].type = static_cast<trt::DataType>(types[i]);
    tensors[i].format = static_cast<trt::TensorFormat>(formats[i]);
  }
}

}  // namespace

extern "C" {

// How many creators the library has; -1 where it cannot be loaded or lacks a function.
int host_open(const char* path, int with_logger) {
  library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return -1;
  auto* const set_finder = reinterpret_cast<void (*)(trt::ILoggerFinder*)>(dlsym(library, "setLoggerFinder"));
  auto* const get_creators =
      reinterpret_cast<trt::IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(library, "getCreators"));
  if (set_finder == nullptr || get_creators == nullptr) return -1;
  set_finder(with_logger ? &finder : nullptr);
  creators = get_creators(creator_count);
  return creator_count;
}

const char* host_creator_name(int index) { return creator(index)->getPluginName(); }
const char* host_creator_version(int index) { return creator(index)->getPluginVersion(); }
const char* host_creator_namespace(int index) { return creator(index)->getPluginNamespace(); }
int host_field_count(int index) { return creator(index)->getFieldNames()->nbFields; }

// Makes the plugin that the other calls are for, as an engine does: a clone, attached to a context.
int host_create(int index) {
  trt::IPluginV3* made =
      creator(index)->createPlugin("node", creator(index)->getFieldNames(), trt::TensorRTPhase::kBUILD);
  if (made == nullptr) return -1;
  trt::IPluginV3* copy = made->clone();
  delete made;
  plugin = copy;
  auto* const core = capability<trt::IPluginV3OneCore>(trt::PluginCapabilityType::kCORE);
  auto* const runtime = capability<trt::IPluginV3OneRuntime>(trt::PluginCapabilityType::kRUNTIME);
  if (strcmp(core->getPluginNamespace(), creator(index)->getPluginNamespace()) != 0) return -1;
  if (runtime->getFieldsToSerialize()->nbFields != 0) return -1;
  plugin = runtime->attachToContext(nullptr);
  delete copy;
  return plugin == nullptr ? -1 : 0;
}

int host_supports(int position, const int64_t* sizes, const int32_t* ranks, const int32_t* types,
                  const int32_t* formats) {
  trt::PluginTensorDesc tensors[kTensors];
  describe(sizes, ranks, types, formats, tensors);
  trt::DynamicPluginTensorDesc dynamic[kTensors] = {};
  for (int i = 0; i < kTensors; ++i) dynamic[i].desc = tensors[i];
  return capability<trt::IPluginV3OneBuild>(trt::PluginCapabilityType::kBUILD)
      ->supportsFormatCombination(position, dynamic, kTensors - 1, 1);
}

// The type of the output, or -1.
int host_output_type(const int32_t* types) {
  trt::DataType inputs[kTensors - 1], output;
  for (int i = 0; i < kTensors - 1; ++i) inputs[i] = static_cast<trt::DataType>(types[i]);
  auto* const build = capability<trt::IPluginV3OneBuild>(trt::PluginCapabilityType::kBUILD);
  return build->getOutputDataTypes(&output, 1, inputs, kTensors - 1) == 0 ? static_cast<int>(output) : -1;
}

int host_on_shape_change(const int64_t* sizes, const int32_t* ranks, const int32_t* types, const int32_t* formats) {
  trt::PluginTensorDesc tensors[kTensors];
  describe(sizes, ranks, types, formats, tensors);
  auto* const runtime = capability<trt::IPluginV3OneRuntime>(trt::PluginCapabilityType::kRUNTIME);
  return runtime->onShapeChange(tensors, kTensors - 1, tensors + kTensors - 1, 1);
}

// On the default stream.
int host_enqueue(const int64_t* sizes, const int32_t* ranks, const int32_t* types, const int32_t* formats,
                 const void* const* inputs, void* output) {
  trt::PluginTensorDesc tensors[kTensors];
  describe(sizes, ranks, types, formats, tensors);
  auto* const runtime = capability<trt::IPluginV3OneRuntime>(trt::PluginCapabilityType::kRUNTIME);
  return runtime->enqueue(tensors, tensors + kTensors - 1, inputs, &output, nullptr, nullptr);
}

// What was logged since the last call.
const char* host_logged() {
  static std::string taken;
  taken = std::move(logged);
  logged.clear();
  return taken.c_str();
}

}  // extern "C"

// Convolution over pixels whose channels lie side by side: the C ABI that every adapter shares.
//
// Axes: N batch, H x W pixels, C channels in, K channels out. All arrays are dense, row-major float32. A shortcut and a
// ReLU are applied before a result leaves the registers.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// K channels of a weight lie side by side, so many as the kernel multiplies at a time; C is a multiple of 16.
#define CONV_LANES 32
#define CONV_CHANNELS 16
#define CONV_MAX_CHANNELS 8192

typedef struct ConvWindow {
  int64_t height, width;  // R x S weights a channel
  int64_t stride_h, stride_w, dilation_h, dilation_w;
  int64_t pad_top, pad_left, pad_bottom, pad_right;
} ConvWindow;

typedef struct ConvParams {
  int64_t batch, height, width, in_channels, out_channels;
  ConvWindow window;
  int64_t relu;  // 0 or 1
  const float* input;  // [N, H, W, C]
  const float* weight;  // [K/32, R, S, C, 32]; or, where conv_winograd_floats is not 0, what conv_winograd made of it
  const float* bias;  // [K]
  const float* shortcut;  // [N, OH, OW, K] to add, or null
  float* output;  // [N, OH, OW, K]
} ConvParams;

// Whether a convolution of these channels and this window is one of the kernel's: 0, else -1.
int conv_servable(int64_t in_channels, int64_t out_channels, const ConvWindow* window);

// A side of the output; less than 1 where the window does not fit.
int64_t conv_out_height(const ConvParams* params);
int64_t conv_out_width(const ConvParams* params);

// A 3x3 window of stride 1 is computed by Winograd's F(4x4, 3x3): a quarter of the products, of transformed weights.
// How many floats these are; 0 for any other window, whose weights are used as they are.
int64_t conv_winograd_floats(int64_t in_channels, int64_t out_channels, const ConvWindow* window);
void conv_winograd(int64_t in_channels, int64_t out_channels, const float* weight, float* transformed);

// The threads are the caller's: `for_each` calls work(data, i) for every i below count, each once and on any thread,
// and returns when all have ended; null is this thread alone. Returns 0, or -1 where there is no memory to work in.
typedef void (*ConvForEach)(void* caller, void (*work)(void* data, size_t index), size_t count, void* data);
int conv_forward(const ConvParams* params, ConvForEach for_each, void* caller);

// For how many threads work is cut here: the process's cores by its affinity and by the container's quota, which is
// read below `cgroup`.
int64_t conv_cores(const char* cgroup);

// What it runs on here: "avx512", "avx2" or "portable"; the best one, unless another was set (for tests and
// benchmarks). Setting returns -1 for a path that does not run here.
const char* conv_cpu_path(void);
int conv_set_cpu_path(const char* name);

#ifdef __cplusplus
}
#endif

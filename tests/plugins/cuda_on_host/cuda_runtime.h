// As much of CUDA as the kernel uses, on the host: the same source, compiled by a C++ compiler, runs as it is written.
//
// A thread of a block is a fiber. It runs alone until it meets the others: in __syncthreads the block's, in __syncwarp
// and the shuffles its warp's. Whatever would be undefined on a GPU ends the launch with an error: lanes that meet in
// different places, or never; loads that are not aligned, or outside of the arrays a test has named. Fibers run in the
// order that the test asks for, so that a result that hangs on it shows: what is read too early is another point's.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719
};
struct CUstream_st;
using cudaStream_t = CUstream_st*;

inline dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace emulation {

constexpr int kWarp = 32, kMaxThreads = 1024;
constexpr size_t kStack = 128 << 10;
enum class Wait { kNothing, kBlock, kWarp, kShuffle, kEnd };

struct Fiber {
  jmp_buf here;
  bool started;
  Wait wait;
  int parity;  // of its warp's exchange
};

inline Fiber fibers[kMaxThreads];
inline std::vector<char> stacks;
inline jmp_buf scheduler;
inline ucontext_t scheduler_context, starting;
inline int current;
inline void (*body)();
inline uint64_t exchange[kMaxThreads / kWarp][2][kWarp];

inline char failure[256];
inline std::vector<std::pair<uintptr_t, size_t>> readable;
inline bool reversed;
inline uint64_t first_block, block_count;  // of those that are run, x first; 0: all
inline dim3 launched_grid;

template <typename... Values>
void fail(const char* format, Values... values) {
  if (failure[0] == 0) snprintf(failure, sizeof(failure), format, values...);
}

inline void enter() {
  body();
  fibers[current].wait = Wait::kEnd;
  _longjmp(scheduler, 1);
}

inline void meet(Wait wait) {
  Fiber& fiber = fibers[current];
  fiber.wait = wait;
  if (_setjmp(fiber.here) == 0) _longjmp(scheduler, 1);
}

inline void resume(int thread) {
  Fiber& fiber = fibers[thread];
  current = thread;
  threadIdx = dim3(thread);
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.here, 1);
  fiber.started = true;
  getcontext(&starting);
  starting.uc_stack.ss_sp = stacks.data() + thread * kStack;
  starting.uc_stack.ss_size = kStack;
  starting.uc_link = nullptr;
  makecontext(&starting, enter, 0);
  setcontext(&starting);
}

// Lets those go on that all wait for the same; false when nobody can.
inline bool release(int threads) {
  bool any = false, ended = true, block = true;
  for (int t = 0; t < threads; ++t) {
    ended = ended && fibers[t].wait == Wait::kEnd;
    block = block && fibers[t].wait == Wait::kBlock;
  }
  if (ended) return false;
  for (int warp = 0; warp < threads; warp += kWarp) {
    const Wait wait = fibers[warp].wait;
    bool together = block || wait == Wait::kWarp || wait == Wait::kShuffle;
    for (int t = warp; t < warp + kWarp; ++t) together = together && fibers[t].wait == wait;
    for (int t = warp; together && t < warp + kWarp; ++t) fibers[t].wait = Wait::kNothing;
    any = any || together;
  }
  if (!any)
    fail("threads of block (%u, %u, %u) wait for each other in different places", blockIdx.x, blockIdx.y, blockIdx.z);
  return any;
}

inline void run_block(int threads) {
  for (int t = 0; t < threads; ++t) fibers[t] = {};
  do {
    for (int i = 0; i < threads; ++i) {
      const int t = reversed ? threads - 1 - i : i;
      if (fibers[t].wait == Wait::kNothing) resume(t);
    }
  } while (release(threads));
}

template <typename T>
void check_load(const T* at, size_t alignment) {
  const auto address = reinterpret_cast<uintptr_t>(at);
  if (address % alignment != 0) fail("a load of %zu bytes is not aligned", sizeof(T));
  for (const auto& [start, size] : readable)
    if (address >= start && address - start + sizeof(T) <= size) return;
  fail("a load of %zu bytes lies outside of every array", sizeof(T));
}

template <typename T>
T load(const T* at) {
  check_load(at, sizeof(T));
  if (failure[0] != 0) return T{};
  T value;
  memcpy(&value, at, sizeof(T));
  return value;
}

}  // namespace emulation

inline void __syncthreads() { emulation::meet(emulation::Wait::kBlock); }
inline void __syncwarp() { emulation::meet(emulation::Wait::kWarp); }

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  using namespace emulation;
  if (mask != 0xffffffffu) fail("a shuffle of some lanes is not emulated");
  const int warp = current / kWarp, lane = current % kWarp, parity = fibers[current].parity ^= 1;
  static_assert(sizeof(T) <= sizeof(uint64_t));
  memcpy(&exchange[warp][parity][lane], &value, sizeof(T));
  meet(Wait::kShuffle);
  memcpy(&value, &exchange[warp][parity][(lane ^ lanes) % kWarp], sizeof(T));
  return value;
}

template <typename T>
T __ldg(const T* at) {
  return emulation::load(at);
}
template <typename T>
T __ldcs(const T* at) {
  return emulation::load(at);
}
inline float __uint_as_float(unsigned bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}
using std::max;
using std::min;

template <typename Params>
cudaError_t cudaLaunchKernel(void (*kernel)(Params), dim3 grid, dim3 block, void** arguments, size_t, cudaStream_t) {
  using namespace emulation;
  launched_grid = grid;
  if (grid.x == 0 || grid.x > 0x7fffffffu || grid.y == 0 || grid.y > 65535 || grid.z == 0 || grid.z > 65535 ||
      block.x == 0 || block.x > kMaxThreads || block.x % kWarp != 0)
    return cudaErrorInvalidConfiguration;
  static_assert(sizeof(Params) <= 4096, "kernels' parameters have 4 KiB");
  static void (*run)(Params);
  static const Params* params;
  run = kernel;
  params = static_cast<const Params*>(arguments[0]);
  body = [] { run(*params); };
  if (stacks.empty()) stacks.resize(kMaxThreads * kStack);
  failure[0] = 0;
  gridDim = grid;
  blockDim = block;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  const uint64_t end = block_count ? std::min(blocks, first_block + block_count) : blocks;
  for (uint64_t i = first_block; i < end && failure[0] == 0; ++i) {
    blockIdx = dim3(static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                    static_cast<unsigned>(i / grid.x / grid.y));
    run_block(static_cast<int>(block.x));
  }
  return failure[0] == 0 ? cudaSuccess : cudaErrorLaunchFailure;
}

inline cudaError_t cudaGetLastError() { return cudaErrorLaunchFailure; }
inline const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaSuccess ? "cudaSuccess" : error == cudaErrorInvalidValue ? "cudaErrorInvalidValue" : "cudaError";
}
inline const char* cudaGetErrorString(cudaError_t) { return emulation::failure[0] ? emulation::failure : "no text"; }

// --- for the tests ---

extern "C" {
// Names an array that the kernel may read, from now on.
inline __attribute__((used)) void emulation_readable(const void* start, size_t size) {
  emulation::readable.emplace_back(reinterpret_cast<uintptr_t>(start), size);
}
inline __attribute__((used)) void emulation_reset() {
  emulation::readable.clear();
  emulation::reversed = false;
  emulation::first_block = emulation::block_count = 0;
}
inline __attribute__((used)) void emulation_reverse() { emulation::reversed = true; }
// Runs `count` blocks alone, counted in x first: a grid too large to be run whole has its ends.
inline __attribute__((used)) void emulation_blocks(uint64_t first, uint64_t count) {
  emulation::first_block = first;
  emulation::block_count = count;
}
inline __attribute__((used)) unsigned emulation_grid(int axis) {
  const dim3& grid = emulation::launched_grid;
  return axis == 0 ? grid.x : axis == 1 ? grid.y : grid.z;
}
}

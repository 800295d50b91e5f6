// The CUDA kernel: softmax, sampling locations, bilinear gather and weighting in one pass, in float.
//
// A unit is a (query, head), and a team of lanes of one warp does it: each lane locates one point, which leaves four
// pixels and four weights in shared memory; then every lane reads all points for its own chunk of channels, 16 bytes at
// a time. So a point is worked out once, whatever D is, and a lane has the loads of several points in flight. The
// softmax divides once, at the end.
//
// An encoder's queries are the pixels themselves: a block takes a square of them, whose samples overlap both ways, and
// all their heads, so that the first-level cache serves most of what the block reads.
//
// The sizes chosen below are reasoned from instruction counts and cache lines: no GPU has run it yet
// (benchmarks/cuda_op.py is to).
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <climits>
#include <cmath>
#include <cstdio>

#include "msda.h"

namespace {

constexpr int kMaxLevelPoints = MSDA_MAX_LEVEL_POINTS;
constexpr int kWarp = 32, kThreads = 128;
constexpr int kBlocksPerProcessor = 5;  // 96 registers a thread: eight loads in flight
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kSquare = 4, kSquareQueries = kSquare * kSquare;
constexpr int64_t kBusyThreads = 1 << 18;  // as many as the largest GPUs hold: below it a unit gets more lanes
constexpr int64_t kSquaresQueries = 1 << 13;  // below it blocks of squares would leave processors idle
constexpr int64_t kMaxGridYZ = 65535;  // and in x there are fewer blocks than queries

struct Launch {
  const void *value, *sampling_offsets, *attention_logits;
  const float* reference_points;
  void* output;
  const int64_t* spatial_shapes;  // the device's; null: `sides` has them
  int batch, queries, pixels, heads, channels, levels, points, reference_dim;
  int level_points;  // L*P
  int level_scale;  // of point i, the level is i * level_scale >> 16
  int lanes, team;  // of a unit: lanes that share out the channels, and all; powers of two
  int queries_per_block;
  int squares;  // the queries are the pixels, and taken by squares
  int sides[2 * kMaxLevelPoints];  // (h, w)
};

struct Level {
  int width, height;  // 0 where the level does not lie within the pixels there are
  int start;  // its first pixel
  int end;  // the pixel after its last one
};

// base + index * size, in one instruction where the compiler would make several.
template <typename T>
__device__ const T* at(const T* base, unsigned index, unsigned size = sizeof(T)) {
#ifdef __CUDA_ARCH__
  const T* address;
  asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(address) : "r"(index), "r"(size), "l"(base));
  return address;
#else
  return reinterpret_cast<const T*>(reinterpret_cast<uintptr_t>(base) + static_cast<uint64_t>(index) * size);
#endif
}

// --- types of value: how 16 bytes, or one number, become floats and come back ---

struct Float32 {
  using Scalar = float;
  static constexpr int kPerLoad = 4;
  static __device__ float widen(float stored) { return stored; }
  static __device__ float narrow(float wide) { return wide; }
  static __device__ float2 load_pair(const float* at) { return __ldcs(reinterpret_cast<const float2*>(at)); }
  static __device__ void widen(const uint4& stored, float (&wide)[kPerLoad]) {
    wide[0] = __uint_as_float(stored.x), wide[1] = __uint_as_float(stored.y);
    wide[2] = __uint_as_float(stored.z), wide[3] = __uint_as_float(stored.w);
  }
  static __device__ uint4 narrow(const float (&wide)[kPerLoad]) {
    return make_uint4(__float_as_uint(wide[0]), __float_as_uint(wide[1]), __float_as_uint(wide[2]),
                      __float_as_uint(wide[3]));
  }
};

// What float16 and bfloat16 have in common: two in a word.
template <typename Narrow>
struct Float16Bits {
  using Scalar = unsigned short;
  static constexpr int kPerLoad = 8;
  static __device__ float2 load_pair(const Scalar* at) {
    return Narrow::widen_pair(__ldcs(reinterpret_cast<const unsigned*>(at)));
  }
  static __device__ void widen(const uint4& stored, float (&wide)[kPerLoad]) {
    const unsigned words[4] = {stored.x, stored.y, stored.z, stored.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = Narrow::widen_pair(words[i]);
      wide[2 * i] = pair.x, wide[2 * i + 1] = pair.y;
    }
  }
  static __device__ uint4 narrow(const float (&wide)[kPerLoad]) {
    return make_uint4(Narrow::narrow_pair(wide[0], wide[1]), Narrow::narrow_pair(wide[2], wide[3]),
                      Narrow::narrow_pair(wide[4], wide[5]), Narrow::narrow_pair(wide[6], wide[7]));
  }
};

struct Float16 : Float16Bits<Float16> {
  using Float16Bits<Float16>::widen;
  using Float16Bits<Float16>::narrow;
  static __device__ float widen(Scalar stored) { return __half2float(__ushort_as_half(stored)); }
  static __device__ Scalar narrow(float wide) { return __half_as_ushort(__float2half_rn(wide)); }
  static __device__ float2 widen_pair(unsigned stored) {
    return __half22float2(*reinterpret_cast<const __half2*>(&stored));
  }
  static __device__ unsigned narrow_pair(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const unsigned*>(&pair);
  }
};

struct BFloat16 : Float16Bits<BFloat16> {
  using Float16Bits<BFloat16>::widen;
  using Float16Bits<BFloat16>::narrow;
  static __device__ float widen(Scalar stored) { return __uint_as_float(static_cast<unsigned>(stored) << 16); }
  static __device__ Scalar narrow(float wide) { return __bfloat16_as_ushort(__float2bfloat16_rn(wide)); }
  static __device__ float2 widen_pair(unsigned stored) {
    return make_float2(__uint_as_float(stored << 16), __uint_as_float(stored & 0xffff0000u));
  }
  static __device__ unsigned narrow_pair(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const unsigned*>(&pair);
  }
};

// A lane's channels: kWidth of them, loaded and stored at once. One at a time for a D or an address that is not a
// multiple of 16 bytes.
template <typename T, int kWidth>
struct Chunk {
  using Stored = uint4;
  static __device__ void widen(const Stored& stored, float (&wide)[kWidth]) { T::widen(stored, wide); }
  static __device__ Stored narrow(const float (&wide)[kWidth]) { return T::narrow(wide); }
  static __device__ float2 load_pair(const typename T::Scalar* at) { return T::load_pair(at); }
};

template <typename T>
struct Chunk<T, 1> {
  using Stored = typename T::Scalar;
  static __device__ void widen(const Stored& stored, float (&wide)[1]) { wide[0] = T::widen(stored); }
  static __device__ Stored narrow(const float (&wide)[1]) { return T::narrow(wide[0]); }
  static __device__ float2 load_pair(const Stored* at) {
    return make_float2(T::widen(__ldcs(at)), T::widen(__ldcs(at + 1)));
  }
};

// --- levels and queries ---

// Every block works the table out for itself: no copy, and no kernel before this one. A level that does not lie within
// the pixels of value is emptied, so that whatever spatial_shapes say nothing else is read.
__device__ void fill_levels(const Launch& p, Level* levels) {
  for (int l = static_cast<int>(threadIdx.x); l < p.levels; l += kThreads) {
    const int64_t h = p.spatial_shapes ? __ldg(p.spatial_shapes + 2 * l) : p.sides[2 * l];
    const int64_t w = p.spatial_shapes ? __ldg(p.spatial_shapes + 2 * l + 1) : p.sides[2 * l + 1];
    const bool sound = h >= 1 && w >= 1 && h <= p.pixels && w <= p.pixels && h * w <= p.pixels;
    levels[l] = {sound ? static_cast<int>(w) : 0, sound ? static_cast<int>(h) : 0, 0, 0};
  }
  __syncthreads();
  for (int l = static_cast<int>(threadIdx.x); l < p.levels; l += kThreads) {
    int64_t start = 0;
    for (int before = 0; before < l; ++before)
      start += static_cast<int64_t>(levels[before].width) * levels[before].height;
    const int64_t end = start + static_cast<int64_t>(levels[l].width) * levels[l].height;
    levels[l].start = static_cast<int>(end <= p.pixels ? start : -1);
    levels[l].end = static_cast<int>(end <= p.pixels ? end : -1);
  }
  __syncthreads();
  for (int l = static_cast<int>(threadIdx.x); l < p.levels; l += kThreads)
    if (levels[l].end < 0) levels[l] = {0, 0, 0, 0};
  __syncthreads();
}

// The pixel at a place in the order of squares: a level by strips of kSquare rows, a strip column by column. Sixteen in
// a row are mostly a square, and every pixel has one place.
__device__ int pixel_at(const Launch& p, const Level* levels, int place) {
  int l = 0;
  while (l + 1 < p.levels && place >= levels[l].end) ++l;
  const Level level = levels[l];
  const int in_level = place - level.start, strip = in_level / (kSquare * level.width);
  const int in_strip = in_level - strip * kSquare * level.width;
  const int rows = min(kSquare, level.height - strip * kSquare);
  const int x = in_strip / rows, y = in_strip - x * rows + strip * kSquare;
  return level.start + y * level.width + x;
}

// --- a unit ---

// A sampled point: its four pixels and their weights; -1 and zero outside the level. (y0,x0) (y0,x1) (y1,x0) (y1,x1).
struct Point {
  int4 pixel;
  float4 weight;
};

// The points of all lanes of a block.
struct Table {
  int4 pixels[kThreads];
  float4 weights[kThreads];
};

__device__ Point locate(const Launch& p, const Level& level, const float* reference, float2 offset, float attention) {
  const float w = static_cast<float>(level.width), h = static_cast<float>(level.height);
  float x, y;  // in pixels of the level, centres on whole numbers
  if (p.reference_dim == 2) {
    x = __ldg(reference) * w + offset.x - 0.5f;
    y = __ldg(reference + 1) * h + offset.y - 0.5f;
  } else {
    const float scale = 0.5f / static_cast<float>(p.points);
    x = (__ldg(reference) + offset.x * __ldg(reference + 2) * scale) * w - 0.5f;
    y = (__ldg(reference + 1) + offset.y * __ldg(reference + 3) * scale) * h - 0.5f;
  }
  if (!(x > -1 && y > -1 && x < w && y < h)) return {make_int4(-1, -1, -1, -1), make_float4(0, 0, 0, 0)};
  const int x0 = static_cast<int>(floorf(x)), y0 = static_cast<int>(floorf(y));
  const float fx = x - static_cast<float>(x0), fy = y - static_cast<float>(y0);
  const bool left = x0 >= 0, right = x0 + 1 < level.width, top = y0 >= 0, bottom = y0 + 1 < level.height;
  const int base = level.start + y0 * level.width + x0;
  const bool inside[4] = {top && left, top && right, bottom && left, bottom && right};
  return {make_int4(inside[0] ? base : -1, inside[1] ? base + 1 : -1, inside[2] ? base + level.width : -1,
                    inside[3] ? base + level.width + 1 : -1),
          make_float4(inside[0] ? (1 - fx) * (1 - fy) * attention : 0, inside[1] ? fx * (1 - fy) * attention : 0,
                      inside[2] ? (1 - fx) * fy * attention : 0, inside[3] ? fx * fy * attention : 0)};
}

// Leaves what is there where there is no pixel.
template <typename Stored>
__device__ void load_pixel(const char* value, int pixel, unsigned stride, Stored& stored) {
  const char* const address = at(value, static_cast<unsigned>(pixel), stride);
  if (pixel >= 0) stored = __ldg(reinterpret_cast<const Stored*>(address));
}

template <typename T, int kWidth>
__device__ void add(float (&sum)[kWidth], const typename Chunk<T, kWidth>::Stored& stored, float weight) {
  float wide[kWidth];
  Chunk<T, kWidth>::widen(stored, wide);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) sum[i] += weight * wide[i];
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) forward(const __grid_constant__ Launch p) {
  using Scalar = typename T::Scalar;
  using Stored = typename Chunk<T, kWidth>::Stored;
  __shared__ Level levels[kMaxLevelPoints];
  __shared__ int queries[kThreads];  // of this block; -1 beyond the last one
  __shared__ Table table;

  const int64_t n = blockIdx.y + static_cast<int64_t>(gridDim.y) * blockIdx.z;
  if (n >= p.batch) return;
  fill_levels(p, levels);
  if (static_cast<int>(threadIdx.x) < p.queries_per_block) {
    const int64_t place = static_cast<int64_t>(blockIdx.x) * p.queries_per_block + threadIdx.x;
    const bool by_squares = p.squares && levels[p.levels - 1].end == p.pixels;
    const int at = static_cast<int>(place);
    queries[threadIdx.x] = place >= p.queries ? -1 : by_squares ? pixel_at(p, levels, at) : at;
  }
  __syncthreads();

  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int member = lane & (p.team - 1), first_lane = lane - member;  // of the team
  const int part = member / p.lanes, parts = p.team / p.lanes;  // of the points, when the team shares them out
  const int chunks = p.channels / kWidth;
  const unsigned stride = p.heads * p.channels * static_cast<unsigned>(sizeof(Scalar));  // bytes from pixel to pixel
  const char* const image = static_cast<const char*>(p.value) + n * p.pixels * stride;
  // A lane's place in the table: as the lanes are, with every row of 8 turned, so that neither a warp's writing nor the
  // teams' reading of one point each meets in a bank.
  const int warp = static_cast<int>(threadIdx.x) - lane;
  const int own_place = warp + (lane ^ (lane >> 3)), team_place = first_lane ^ (first_lane >> 3);

  // These loops end together for all lanes of a warp: they meet in every shuffle and __syncwarp.
  const int units = p.queries_per_block * p.heads;
  for (int first_unit = 0; first_unit < units; first_unit += kThreads / p.team) {
    const int unit = first_unit + static_cast<int>(threadIdx.x) / p.team;
    const int in_block = unit / p.heads, head = unit - in_block * p.heads;
    const int query = unit < units ? queries[in_block] : -1;
    const bool active = query >= 0;
    const int64_t row = n * p.queries + query, row_head = row * p.heads + head;
    const Scalar* const offsets = static_cast<const Scalar*>(p.sampling_offsets) + row_head * p.level_points * 2;
    const Scalar* const logits = static_cast<const Scalar*>(p.attention_logits) + row_head * p.level_points;
    const float* const references = p.reference_points + row * p.levels * p.reference_dim;

    float top = -INFINITY;
    for (int i = member; active && i < p.level_points; i += p.team) top = fmaxf(top, T::widen(__ldg(at(logits, i))));
    for (int step = 1; step < p.team; step *= 2) top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, step));

    for (int first_chunk = 0; first_chunk < chunks; first_chunk += p.lanes) {
      const int chunk = first_chunk + (member & (p.lanes - 1));
      const bool reads = active && chunk < chunks;
      const char* const value = at(image, static_cast<unsigned>(head * chunks + chunk), unsigned{sizeof(Stored)});
      float sum[kWidth] = {};
      float total = 0;
      // Outside of a level nothing is loaded: what is still here, zeros or values that this unit has read before, gets
      // the weight zero. So a number that is none spoils no unit but those that read it.
      Stored stored[2][4] = {};
      for (int first_point = 0; first_point < p.level_points; first_point += p.team) {
        const int i = first_point + member;
        Point point = {make_int4(-1, -1, -1, -1), make_float4(0, 0, 0, 0)};
        if (active && i < p.level_points) {
          const int l = i * p.level_scale >> 16;
          const float attention = expf(T::widen(__ldg(at(logits, i))) - top);
          total += attention;
          point = locate(p, levels[l], at(references, l * p.reference_dim),
                         Chunk<T, kWidth>::load_pair(at(offsets, 2 * i)), attention);
        }
        table.pixels[own_place] = point.pixel;
        table.weights[own_place] = point.weight;
        __syncwarp();
        if (reads) {
          const int end = min(p.team, p.level_points - first_point);
          // Two points at a time, for eight loads in flight. There are two, as there are two lanes to a part.
          for (int k = part; k < end; k += 2 * parts) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
              const int other = k + j * parts;
              const int4 pixel = table.pixels[warp + (team_place ^ other ^ (other >> 3))];
              load_pixel(value, pixel.x, stride, stored[j][0]);
              load_pixel(value, pixel.y, stride, stored[j][1]);
              load_pixel(value, pixel.z, stride, stored[j][2]);
              load_pixel(value, pixel.w, stride, stored[j][3]);
            }
#pragma unroll
            for (int j = 0; j < 2; ++j) {
              const int other = k + j * parts;
              const float4 weight = table.weights[warp + (team_place ^ other ^ (other >> 3))];
              add<T, kWidth>(sum, stored[j][0], weight.x);
              add<T, kWidth>(sum, stored[j][1], weight.y);
              add<T, kWidth>(sum, stored[j][2], weight.z);
              add<T, kWidth>(sum, stored[j][3], weight.w);
            }
          }
        }
        __syncwarp();
      }
      for (int step = 1; step < p.team; step *= 2) total += __shfl_xor_sync(kAllLanes, total, step);
      for (int step = p.lanes; step < p.team; step *= 2) {
#pragma unroll
        for (int c = 0; c < kWidth; ++c) sum[c] += __shfl_xor_sync(kAllLanes, sum[c], step);
      }
      if (reads && part == 0) {
        const float share = 1 / total;
#pragma unroll
        for (int c = 0; c < kWidth; ++c) sum[c] *= share;
        static_cast<Stored*>(p.output)[row_head * chunks + chunk] = Chunk<T, kWidth>::narrow(sum);
      }
    }
  }
}

// --- the launch ---

bool aligned(const void* pointer, size_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// Of the kernel for a type: in chunks of 16 bytes where the addresses allow it, else one channel at a time.
template <typename T>
cudaError_t launch(const MsdaParams& params, const int64_t* host_shapes, void* output, cudaStream_t stream) {
  constexpr int64_t kSize = sizeof(typename T::Scalar);
  const MsdaParams& p = params;
  if (p.pixels > INT_MAX || p.queries > INT_MAX || p.batch > INT_MAX || p.heads > INT_MAX / kThreads ||
      p.channels > INT_MAX / kSize / p.heads)
    return cudaErrorInvalidValue;
  if (p.batch * p.queries == 0) return cudaSuccess;

  Launch l{};
  l.value = p.value, l.sampling_offsets = p.sampling_offsets, l.attention_logits = p.attention_logits;
  l.reference_points = p.reference_points;
  l.output = output;
  l.batch = static_cast<int>(p.batch), l.queries = static_cast<int>(p.queries);
  l.pixels = static_cast<int>(p.pixels), l.heads = static_cast<int>(p.heads);
  l.channels = static_cast<int>(p.channels), l.levels = static_cast<int>(p.levels);
  l.points = static_cast<int>(p.points), l.reference_dim = static_cast<int>(p.reference_dim);
  l.level_points = l.levels * l.points;
  l.level_scale = ((1 << 16) + l.points - 1) / l.points;
  if (host_shapes == nullptr) l.spatial_shapes = p.spatial_shapes;
  else
    for (int i = 0; i < 2 * l.levels; ++i)
      l.sides[i] = host_shapes[i] < 1 || host_shapes[i] > INT_MAX ? 0 : static_cast<int>(host_shapes[i]);

  const bool wide = p.channels % T::kPerLoad == 0 && aligned(p.value, 16) && aligned(output, 16) &&
                    aligned(p.sampling_offsets, 2 * kSize);
  const int64_t chunks = wide ? p.channels / T::kPerLoad : p.channels;
  l.lanes = 2;
  while (l.lanes < chunks && l.lanes < kWarp) l.lanes *= 2;
  l.team = l.lanes;
  const int64_t rows = p.batch * p.queries, units = rows < kBusyThreads ? rows * p.heads : kBusyThreads;
  while (l.team < kWarp && units * l.team < kBusyThreads && 2 * (l.team / l.lanes) < l.level_points) l.team *= 2;
  const int teams = kThreads / l.team;
  l.squares = p.queries == p.pixels && rows >= kSquaresQueries;
  l.queries_per_block = l.squares ? kSquareQueries : l.heads < teams ? teams / l.heads : 1;
  const int64_t images_z = (p.batch + kMaxGridYZ - 1) / kMaxGridYZ;
  const dim3 grid(static_cast<unsigned>((p.queries + l.queries_per_block - 1) / l.queries_per_block),
                  static_cast<unsigned>((p.batch + images_z - 1) / images_z), static_cast<unsigned>(images_z));

  void* arguments[] = {&l};
  const auto kernel = wide ? &forward<T, T::kPerLoad> : &forward<T, 1>;
  const cudaError_t launched = cudaLaunchKernel(kernel, grid, dim3(kThreads), arguments, 0, stream);
  return launched == cudaSuccess ? launched : cudaGetLastError();  // said once: the next call shall not meet it again
}

cudaError_t forward_cuda(const MsdaParams& p, const int64_t* host_shapes, void* output, void* stream) {
  if (p.batch < 0 || p.pixels < 0 || p.heads < 0 || p.channels < 0 || p.queries < 0 || p.levels < 1 || p.points < 1 ||
      p.levels > kMaxLevelPoints || p.points > kMaxLevelPoints / p.levels ||
      (p.reference_dim != 2 && p.reference_dim != 4))
    return cudaErrorInvalidValue;
  if (p.heads == 0 || p.channels == 0) return cudaSuccess;
  const auto on = static_cast<cudaStream_t>(stream);
  switch (p.type) {
    case MSDA_FLOAT32: return launch<Float32>(p, host_shapes, output, on);
    case MSDA_FLOAT16: return launch<Float16>(p, host_shapes, output, on);
    case MSDA_BFLOAT16: return launch<BFloat16>(p, host_shapes, output, on);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace

extern "C" int msda_forward_cuda(const MsdaParams* params, void* output, void* stream) {
  return forward_cuda(*params, nullptr, output, stream);
}

extern "C" int msda_forward_cuda_host_shapes(const MsdaParams* params, void* output, void* stream) {
  return forward_cuda(*params, params->spatial_shapes, output, stream);
}

extern "C" const char* msda_cuda_error(int error) {
  thread_local char text[512];
  const auto code = static_cast<cudaError_t>(error);
  snprintf(text, sizeof(text), "%s: %s", cudaGetErrorName(code), cudaGetErrorString(code));
  return text;
}

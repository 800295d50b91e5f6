// The CPU kernel: one pass per query and head over its L*P points, forward and backward, computed in float.
#include "msda.h"

#include <atomic>
#include <cmath>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../cpu_path.h"

#if defined(__x86_64__) && !defined(__clang__)
#define MSDA_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MSDA_CLONES
#endif
#define MSDA_INLINE inline __attribute__((always_inline))

namespace {

// --- half precision, one number at a time ---

struct Half {
  uint16_t bits;
};

MSDA_INLINE float as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

MSDA_INLINE uint32_t as_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

[[maybe_unused]] MSDA_INLINE float to_float(Half half) {
  const uint32_t sign = (half.bits & 0x8000u) << 16, rest = half.bits & 0x7fffu;
  if (rest >= 0x7c00u) return as_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13);  // infinite, or not a number
  if (rest >= 0x0400u) return as_float(sign | ((rest << 13) + 0x38000000u));
  return as_float(sign | as_bits(static_cast<float>(rest) * 5.9604644775390625e-8f));  // 2^-24 apart
}

[[maybe_unused]] MSDA_INLINE Half to_half(float x) {  // to the nearest, ties to even
  const uint32_t sign = as_bits(x) >> 16 & 0x8000u, rest = as_bits(x) & 0x7fffffffu;
  uint32_t bits;
  if (rest > 0x7f800000u) bits = 0x7e00u;
  else if (rest >= 0x47800000u) bits = 0x7c00u;
  else if (rest >= 0x38800000u) bits = (rest - 0x38000000u + 0xfffu + (rest >> 13 & 1)) >> 13;
  else bits = as_bits(as_float(rest) + 0.5f) - as_bits(0.5f);  // 0.5's last bit is 2^-24
  return {static_cast<uint16_t>(sign | bits)};
}

// --- forward, once for each instruction set ---

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
#define MSDA_AVX512
namespace avx512 {
#include "msda_cpu_rows.inc"
}
#undef MSDA_AVX512
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define MSDA_AVX2
namespace avx2 {
#include "msda_cpu_rows.inc"
}
#undef MSDA_AVX2
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif

namespace portable {
#include "msda_cpu_rows.inc"
}

struct Path {
  const char* name;
  bool (*runs_here)();
  void (*forward)(const MsdaParams& params, int64_t begin, int64_t end, void* output);
};

constexpr Path kPaths[] = {
#if defined(__x86_64__)
    {"avx512", cpu::has_avx512, avx512::forward_rows},
    {"avx2", cpu::has_avx2, avx2::forward_rows},
#endif
    {"portable", cpu::runs_everywhere, portable::forward_rows},
};

cpu::Chosen<Path>& chosen() {
  static cpu::Chosen<Path> path{kPaths};
  return path;
}

// --- backward ---

constexpr int64_t kMaxLevelPoints = MSDA_MAX_LEVEL_POINTS;
constexpr int64_t kBlockSamples = 8192;  // of a piece of work, some 50 us
constexpr int64_t kShares = 32;          // at least so many pieces, that threads end together

// A sampled point: its four corners as offsets into one head's value (-1: outside the level), and its place between.
struct Point {
  int64_t corner[4];  // (y0,x0) (y0,x1) (y1,x0) (y1,x1)
  float fx, fy;
};

MSDA_INLINE void softmax(const float* logits, int64_t count, float* weights) {
  float top = logits[0];
  for (int64_t i = 1; i < count; ++i) top = logits[i] > top ? logits[i] : top;
  float sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += weights[i] = std::exp(logits[i] - top);
  for (int64_t i = 0; i < count; ++i) weights[i] /= sum;
}

MSDA_INLINE Point locate(const MsdaParams& p, const float* reference, const float* offset, int64_t h, int64_t w,
                         int64_t start) {
  float x, y;  // in pixels of the level, centres on whole numbers
  if (p.reference_dim == 2) {
    x = reference[0] * w + offset[0] - 0.5f;
    y = reference[1] * h + offset[1] - 0.5f;
  } else {
    const float scale = 0.5f / p.points;
    x = (reference[0] + offset[0] * reference[2] * scale) * w - 0.5f;
    y = (reference[1] + offset[1] * reference[3] * scale) * h - 0.5f;
  }
  Point point;
  if (!(x > -1 && y > -1 && x < w && y < h)) {  // wholly outside, or not a number
    for (int64_t& corner : point.corner) corner = -1;
    point.fx = point.fy = 0;
    return point;
  }
  const int64_t x0 = static_cast<int64_t>(x + 1) - 1;  // floor, as x > -1
  const int64_t y0 = static_cast<int64_t>(y + 1) - 1;
  point.fx = x - x0;
  point.fy = y - y0;
  const bool left = x0 >= 0, right = x0 + 1 < w, top = y0 >= 0, bottom = y0 + 1 < h;
  const int64_t base = start + y0 * w + x0;
  point.corner[0] = top && left ? base : -1;
  point.corner[1] = top && right ? base + 1 : -1;
  point.corner[2] = bottom && left ? base + w : -1;
  point.corner[3] = bottom && right ? base + w + 1 : -1;
  return point;
}

template <int64_t D>
MSDA_INLINE void backward_unit(const MsdaParams& p, int64_t n, int64_t m, const float* grad_output, float* grad_value,
                               float* grad_locations, float* grad_logits) {
  const int64_t channels = D ? D : p.channels, pixel = p.heads * channels, lp = p.levels * p.points;
  const int64_t head = n * p.pixels * pixel + m * channels;
  const float* value = static_cast<const float*>(p.value) + head;
  float* value_grad = grad_value + head;
  float weights[kMaxLevelPoints], weight_grad[kMaxLevelPoints];
  for (int64_t q = 0; q < p.queries; ++q) {
    const int64_t row = (n * p.queries + q) * p.heads + m;
    const float* offset = static_cast<const float*>(p.sampling_offsets) + row * lp * 2;
    const float* g = grad_output + row * channels;
    float* location_grad = grad_locations + row * lp * 2;
    softmax(static_cast<const float*>(p.attention_logits) + row * lp, lp, weights);
    int64_t start = 0, index = 0;
    float mean = 0;  // the weights' mean gradient, which softmax takes away
    for (int64_t l = 0; l < p.levels; ++l) {
      const int64_t h = p.spatial_shapes[2 * l], w = p.spatial_shapes[2 * l + 1];
      const float* reference = p.reference_points + ((n * p.queries + q) * p.levels + l) * p.reference_dim;
      for (int64_t k = 0; k < p.points; ++k, ++index) {
        const Point point = locate(p, reference, offset + 2 * index, h, w, start);
        const float a = weights[index], fx = point.fx, fy = point.fy;
        const float bilinear[4] = {(1 - fx) * (1 - fy), fx * (1 - fy), (1 - fx) * fy, fx * fy};
        float dot[4] = {0, 0, 0, 0};
        for (int c = 0; c < 4; ++c) {
          if (point.corner[c] < 0) continue;
          const float* v = value + point.corner[c] * pixel;
          float* vg = value_grad + point.corner[c] * pixel;
          const float scale = bilinear[c] * a;
          float sum = 0;
          for (int64_t d = 0; d < channels; ++d) sum += g[d] * v[d];
          for (int64_t d = 0; d < channels; ++d) vg[d] += scale * g[d];
          dot[c] = sum;
        }
        const float dw = bilinear[0] * dot[0] + bilinear[1] * dot[1] + bilinear[2] * dot[2] + bilinear[3] * dot[3];
        weight_grad[index] = dw;
        mean += a * dw;
        location_grad[2 * index] = a * w * ((1 - fy) * (dot[1] - dot[0]) + fy * (dot[3] - dot[2]));
        location_grad[2 * index + 1] = a * h * ((1 - fx) * (dot[2] - dot[0]) + fx * (dot[3] - dot[1]));
      }
      start += h * w;
    }
    float* logit_grad = grad_logits + row * lp;
    for (int64_t i = 0; i < lp; ++i) logit_grad[i] = weights[i] * (weight_grad[i] - mean);
  }
}

bool servable(const MsdaParams& p) {
  return p.levels * p.points > 0 && p.levels * p.points <= kMaxLevelPoints &&
         (p.reference_dim == 2 || p.reference_dim == 4);
}

}  // namespace

extern "C" int64_t msda_rows_per_block(const MsdaParams* params) {
  const int64_t rows = params->batch * params->queries, samples = params->heads * params->levels * params->points;
  const int64_t most = samples > 0 ? kBlockSamples / samples : 1;
  const int64_t share = rows / kShares;
  const int64_t block = share < most ? share : most;
  return block > 1 ? block : 1;
}

extern "C" int msda_forward_rows(const MsdaParams* params, int64_t begin, int64_t end, void* output) {
  const MsdaParams& p = *params;
  if ((p.type != MSDA_FLOAT32 && p.type != MSDA_FLOAT16) || p.pixels > INT32_MAX || !servable(p)) return -1;
  chosen()->forward(p, begin, end, output);
  return 0;
}

extern "C" const char* msda_cpu_path(void) { return chosen()->name; }

extern "C" int msda_set_cpu_path(const char* name) { return chosen().choose(name); }

extern "C" MSDA_CLONES int msda_backward_f32(const MsdaParams* params, int64_t begin, int64_t end,
                                             const float* grad_output, float* grad_value, float* grad_locations,
                                             float* grad_logits) {
  if (params->type != MSDA_FLOAT32 || !servable(*params)) return -1;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t n = unit / params->heads, m = unit % params->heads;
    switch (params->channels) {
      case 16: backward_unit<16>(*params, n, m, grad_output, grad_value, grad_locations, grad_logits); break;
      case 32: backward_unit<32>(*params, n, m, grad_output, grad_value, grad_locations, grad_logits); break;
      default: backward_unit<0>(*params, n, m, grad_output, grad_value, grad_locations, grad_logits);
    }
  }
  return 0;
}

namespace {

// Threads take blocks of units until none is left.
struct Job {
  int64_t units, block;
  int (*run)(const Job& job, int64_t begin, int64_t end);
  const MsdaParams* params;
  void* output;
  const float* grad_output;
  float *grad_value, *grad_locations, *grad_logits;
  std::atomic<int64_t> next{0};
  std::atomic<int> status{0};
};

void work(void* data) {
  Job& job = *static_cast<Job*>(data);
  for (int64_t begin; (begin = job.next.fetch_add(job.block, std::memory_order_relaxed)) < job.units;) {
    const int64_t end = begin + job.block < job.units ? begin + job.block : job.units;
    if (const int failed = job.run(job, begin, end)) job.status.store(failed, std::memory_order_relaxed);
  }
}

int run(Job& job, MsdaParallel parallel, unsigned threads) {
  if (parallel == nullptr || threads < 2 || job.units <= job.block) work(&job);
  else parallel(work, &job, threads, 0);
  return job.status.load();
}

}  // namespace

extern "C" int msda_forward_cpu(const MsdaParams* params, void* output, MsdaParallel parallel, unsigned threads) {
  Job job;
  job.units = params->batch * params->queries;
  job.block = msda_rows_per_block(params);
  job.params = params;
  job.output = output;
  job.run = [](const Job& j, int64_t begin, int64_t end) { return msda_forward_rows(j.params, begin, end, j.output); };
  return run(job, parallel, threads);
}

extern "C" int msda_backward_cpu(const MsdaParams* params, const float* grad_output, float* grad_value,
                                 float* grad_locations, float* grad_logits, MsdaParallel parallel, unsigned threads) {
  Job job;
  job.units = params->batch * params->heads;
  job.block = 1;
  job.params = params;
  job.grad_output = grad_output;
  job.grad_value = grad_value;
  job.grad_locations = grad_locations;
  job.grad_logits = grad_logits;
  job.run = [](const Job& j, int64_t begin, int64_t end) {
    return msda_backward_f32(j.params, begin, end, j.grad_output, j.grad_value, j.grad_locations, j.grad_logits);
  };
  return run(job, parallel, threads);
}

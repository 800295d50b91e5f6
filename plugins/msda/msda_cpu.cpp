// The CPU kernel: one pass per query and head over its L*P points, forward and backward, in float.
#include "msda.h"

#include <cmath>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MSDA_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MSDA_CLONES
#endif
#define MSDA_INLINE inline __attribute__((always_inline))

namespace {

constexpr int64_t kMaxLevelPoints = MSDA_MAX_LEVEL_POINTS;

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

// One query of one image, all its heads. D is the number of channels when it is known at compile time, 0 when it is
// not.
template <int64_t D>
MSDA_INLINE void forward_row(const MsdaParams& p, int64_t row, float* output) {
  const int64_t channels = D ? D : p.channels, pixel = p.heads * channels, lp = p.levels * p.points;
  const float* image = static_cast<const float*>(p.value) + row / p.queries * p.pixels * pixel;
  const float* references = p.reference_points + row * p.levels * p.reference_dim;
  float weights[kMaxLevelPoints];
  for (int64_t m = 0; m < p.heads; ++m) {
    const int64_t head = row * p.heads + m;
    const float* value = image + m * channels;
    const float* offset = static_cast<const float*>(p.sampling_offsets) + head * lp * 2;
    float* out = output + head * channels;
    float sum[D ? D : 1];
    if (D) memset(sum, 0, sizeof(sum));
    else memset(out, 0, channels * sizeof(float));
    float* acc = D ? sum : out;
    softmax(static_cast<const float*>(p.attention_logits) + head * lp, lp, weights);
    int64_t start = 0, index = 0;
    for (int64_t l = 0; l < p.levels; ++l) {
      const int64_t h = p.spatial_shapes[2 * l], w = p.spatial_shapes[2 * l + 1];
      const float* reference = references + l * p.reference_dim;
      for (int64_t k = 0; k < p.points; ++k, ++index) {
        const Point point = locate(p, reference, offset + 2 * index, h, w, start);
        const float a = weights[index], fx = point.fx, fy = point.fy;
        const float bilinear[4] = {(1 - fx) * (1 - fy) * a, fx * (1 - fy) * a, (1 - fx) * fy * a, fx * fy * a};
        const int64_t* corner = point.corner;
        if ((corner[0] | corner[3]) >= 0) {  // all four inside: nearly always, and one pass over the sum
          const float *v0 = value + corner[0] * pixel, *v1 = v0 + pixel, *v2 = value + corner[2] * pixel,
                      *v3 = v2 + pixel;
          for (int64_t d = 0; d < channels; ++d)
            acc[d] += bilinear[0] * v0[d] + bilinear[1] * v1[d] + bilinear[2] * v2[d] + bilinear[3] * v3[d];
          continue;
        }
        for (int c = 0; c < 4; ++c) {
          if (point.corner[c] < 0) continue;
          const float* v = value + point.corner[c] * pixel;
          for (int64_t d = 0; d < channels; ++d) acc[d] += bilinear[c] * v[d];
        }
      }
      start += h * w;
    }
    if (D) memcpy(out, sum, sizeof(sum));
  }
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
  return p.type == MSDA_FLOAT32 && p.levels * p.points > 0 && p.levels * p.points <= kMaxLevelPoints &&
         (p.reference_dim == 2 || p.reference_dim == 4);
}

}  // namespace

extern "C" MSDA_CLONES int msda_forward_rows(const MsdaParams* params, int64_t begin, int64_t end, void* rows) {
  if (!servable(*params)) return -1;
  float* output = static_cast<float*>(rows);
  for (int64_t row = begin; row < end; ++row) {
    switch (params->channels) {
      case 16: forward_row<16>(*params, row, output); break;
      case 32: forward_row<32>(*params, row, output); break;
      default: forward_row<0>(*params, row, output);
    }
  }
  return 0;
}

extern "C" MSDA_CLONES int msda_backward_f32(const MsdaParams* params, int64_t begin, int64_t end,
                                             const float* grad_output, float* grad_value, float* grad_locations,
                                             float* grad_logits) {
  if (!servable(*params)) return -1;
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

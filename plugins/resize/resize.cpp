// Two passes, along the rows and then down the columns, with 8 bits between them and weights of 22 bits after the
// point.

#include "resize.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <vector>

#ifdef __x86_64__
#include <immintrin.h>
#define ALSO_WITH_AVX2 __attribute__((target_clones("avx2", "default")))
#else
#define ALSO_WITH_AVX2
#endif

namespace {

constexpr int kChannels = 3;
constexpr int kFraction = 32 - 8 - 2; // bits: a sum of weights near 1 times 255 stays within 32, signed
constexpr int32_t kHalf = 1 << (kFraction - 1);
constexpr int64_t kLongestSide = 65535;

// Which pixels of a line each pixel of the new line is made of, and by what weights.
struct Taps {
  int count; // room for each pixel
  std::vector<int> first, used;
  std::vector<int32_t> weights; // [pixels, count]

  Taps(int64_t from, int64_t to) : first(to), used(to) {
    const double scale = double(from) / double(to);
    const double stretch = std::max(scale, 1.0); // the triangle's half width, in pixels of the old line
    count = int(std::ceil(stretch)) * 2 + 1;
    weights.assign(size_t(to) * count, 0);
    std::vector<double> exact(count);
    for (int64_t pixel = 0; pixel < to; ++pixel) {
      const double centre = (double(pixel) + 0.5) * scale;
      const int begin = std::max(int(centre - stretch + 0.5), 0);
      const int end = std::min(int(centre + stretch + 0.5), int(from));
      double sum = 0;
      for (int tap = 0; tap < end - begin; ++tap) {
        const double distance = std::abs((double(tap + begin) - centre + 0.5) / stretch);
        exact[tap] = std::max(1.0 - distance, 0.0);
        sum += exact[tap];
      }
      for (int tap = 0; tap < end - begin; ++tap) {
        const double weight = sum != 0 ? exact[tap] / sum : exact[tap];
        weights[pixel * count + tap] = int32_t(weight * (1 << kFraction) + 0.5);
      }
      first[pixel] = begin;
      used[pixel] = end - begin;
    }
  }
};

uint8_t to_byte(int32_t sum) { return uint8_t(std::clamp(sum >> kFraction, 0, 255)); }

void resize_row(const uint8_t* source, const Taps& taps, uint8_t* target, int64_t pixels) {
  for (int64_t pixel = 0; pixel < pixels; ++pixel) {
    const int32_t* weights = &taps.weights[pixel * taps.count];
    const uint8_t* from = source + int64_t(taps.first[pixel]) * kChannels;
    int32_t sum[kChannels] = {kHalf, kHalf, kHalf};
    for (int tap = 0; tap < taps.used[pixel]; ++tap)
      for (int channel = 0; channel < kChannels; ++channel)
        sum[channel] += from[tap * kChannels + channel] * weights[tap];
    for (int channel = 0; channel < kChannels; ++channel) target[pixel * kChannels + channel] = to_byte(sum[channel]);
  }
}

#ifdef __x86_64__
// Two rows at once, a pixel of each in half of a register. `source` must be readable one byte beyond the second.
__attribute__((target("avx2"))) void resize_two_rows(const uint8_t* source, int64_t source_stride, const Taps& taps,
                                                     uint8_t* target, int64_t pixels) {
  const int64_t stride = pixels * kChannels;
  for (int64_t pixel = 0; pixel < pixels; ++pixel) {
    const int32_t* weights = &taps.weights[pixel * taps.count];
    const uint8_t* from = source + int64_t(taps.first[pixel]) * kChannels;
    __m256i sum = _mm256_set1_epi32(kHalf);
    for (int tap = 0; tap < taps.used[pixel]; ++tap, from += kChannels) {
      const __m128i both = _mm_unpacklo_epi32(_mm_loadu_si32(from), _mm_loadu_si32(from + source_stride));
      sum = _mm256_add_epi32(sum, _mm256_mullo_epi32(_mm256_cvtepu8_epi32(both), _mm256_set1_epi32(weights[tap])));
    }
    sum = _mm256_srai_epi32(sum, kFraction);
    const __m256i bytes = _mm256_packus_epi16(_mm256_packs_epi32(sum, sum), sum); // saturates to 0..255
    const int32_t upper = _mm256_extract_epi32(bytes, 0), lower = _mm256_extract_epi32(bytes, 4);
    uint8_t* to = target + pixel * kChannels;
    std::memcpy(to, &upper, kChannels);
    std::memcpy(to + stride, &lower, kChannels);
  }
}
#endif

void resize_rows(const uint8_t* source, int64_t rows, int64_t source_stride, const Taps& taps, uint8_t* target,
                 int64_t pixels) {
  int64_t row = 0;
#ifdef __x86_64__
  static const bool has_avx2 = __builtin_cpu_supports("avx2");
  for (; has_avx2 && row + 2 < rows; row += 2)
    resize_two_rows(source + row * source_stride, source_stride, taps, target + row * pixels * kChannels, pixels);
#endif
  for (; row < rows; ++row) resize_row(source + row * source_stride, taps, target + row * pixels * kChannels, pixels);
}

// rows[tap] [bytes] weighted and summed.
ALSO_WITH_AVX2 void sum_rows(const uint8_t* rows, int64_t stride, const int32_t* weights, int used,
                             uint8_t* __restrict target, int64_t bytes) {
  constexpr int kBlock = 64; // sums that stay in registers
  int64_t at = 0;
  for (; at + kBlock <= bytes; at += kBlock) {
    int32_t sums[kBlock];
    for (int lane = 0; lane < kBlock; ++lane) sums[lane] = kHalf;
    for (int tap = 0; tap < used; ++tap) {
      const uint8_t* from = rows + tap * stride + at;
      for (int lane = 0; lane < kBlock; ++lane) sums[lane] += from[lane] * weights[tap];
    }
    for (int lane = 0; lane < kBlock; ++lane) target[at + lane] = to_byte(sums[lane]);
  }
  for (; at < bytes; ++at) {
    int32_t sum = kHalf;
    for (int tap = 0; tap < used; ++tap) sum += rows[tap * stride + at] * weights[tap];
    target[at] = to_byte(sum);
  }
}

void resize(const uint8_t* source, int64_t height, int64_t width, uint8_t* target, int64_t target_height,
            int64_t target_width) {
  const uint8_t* rows = source;
  std::vector<uint8_t> between;
  const int64_t stride = target_width * kChannels;
  if (width != target_width) {
    const Taps across(width, target_width);
    between.resize(size_t(height * stride));
    resize_rows(source, height, width * kChannels, across, between.data(), target_width);
    rows = between.data();
  }
  if (height == target_height) {
    std::memcpy(target, rows, size_t(height * stride));
    return;
  }
  const Taps down(height, target_height);
  for (int64_t row = 0; row < target_height; ++row)
    sum_rows(rows + down.first[row] * stride, stride, &down.weights[row * down.count], down.used[row],
             target + row * stride, stride);
}

bool is_side(int64_t pixels) { return 1 <= pixels && pixels <= kLongestSide; }

} // namespace

extern "C" int32_t resize_rgb(const uint8_t* source, int64_t height, int64_t width, uint8_t* target,
                              int64_t target_height, int64_t target_width) {
  if (!is_side(height) || !is_side(width) || !is_side(target_height) || !is_side(target_width)) return 1;
  try {
    resize(source, height, width, target, target_height, target_width);
  } catch (const std::bad_alloc&) {
    return 2;
  }
  return 0;
}

// The floor of the CPU kernel: as many loads, multiplications and additions as the op has, all from the innermost
// cache.
#include <immintrin.h>

#include <cstdint>

namespace {

constexpr int64_t kCorners = 64;  // of L*P = 16 points
constexpr int64_t kChannels = 32;

}  // namespace

// One call does `heads` sums of 64 corners with 32 channels each, of 4 KiB of values; they end in `output` [32].
extern "C" __attribute__((target("avx512f"))) void floor_avx512(const float* values, const float* weights,
                                                                int64_t heads, float* output) {
  for (int64_t head = 0; head < heads; ++head) {
    __m512 low[4] = {}, high[4] = {};
    for (int64_t i = 0; i < kCorners; i += 4) {
      for (int c = 0; c < 4; ++c) {
        const float* corner = values + (i + c) % 32 * kChannels;
        const __m512 weight = _mm512_set1_ps(weights[i + c]);
        low[c] = _mm512_fmadd_ps(weight, _mm512_loadu_ps(corner), low[c]);
        high[c] = _mm512_fmadd_ps(weight, _mm512_loadu_ps(corner + 16), high[c]);
      }
    }
    _mm512_storeu_ps(output, (low[0] + low[1]) + (low[2] + low[3]));
    _mm512_storeu_ps(output + 16, (high[0] + high[1]) + (high[2] + high[3]));
    asm volatile("" : : "r"(output), "r"(values) : "memory");
  }
}

extern "C" __attribute__((target("avx2,fma"))) void floor_avx2(const float* values, const float* weights, int64_t heads,
                                                               float* output) {
  for (int64_t head = 0; head < heads; ++head) {
    __m256 sums[2][4] = {};
    for (int64_t i = 0; i < kCorners; ++i) {
      const float* corner = values + i % 32 * kChannels;
      const __m256 weight = _mm256_set1_ps(weights[i]);
      for (int k = 0; k < 4; ++k)
        sums[i % 2][k] = _mm256_fmadd_ps(weight, _mm256_loadu_ps(corner + 8 * k), sums[i % 2][k]);
    }
    for (int k = 0; k < 4; ++k) _mm256_storeu_ps(output + 8 * k, sums[0][k] + sums[1][k]);
    asm volatile("" : : "r"(output), "r"(values) : "memory");
  }
}

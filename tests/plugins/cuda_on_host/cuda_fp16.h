// CUDA's float16 on the host, by bits: rounded to nearest, ties to even.
#pragma once

#include <cuda_runtime.h>

struct __half {
  unsigned short bits;
};
struct alignas(4) __half2 {
  __half x, y;
};

inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half value) { return value.bits; }

inline float __half2float(__half value) {
  const unsigned sign = (value.bits & 0x8000u) << 16, exponent = value.bits >> 10 & 0x1f, fraction = value.bits & 0x3ff;
  if (exponent == 0x1f) return __uint_as_float(sign | 0x7f800000u | fraction << 13);
  if (exponent == 0) return (sign ? -1.0f : 1.0f) * std::ldexp(static_cast<float>(fraction), -24);
  return __uint_as_float(sign | (exponent + 112) << 23 | fraction << 13);
}

inline __half __float2half_rn(float value) {
  const unsigned bits = __float_as_uint(value), sign = bits >> 16 & 0x8000u;
  const float magnitude = std::fabs(value);
  if (std::isnan(value)) return {static_cast<unsigned short>(sign | 0x7fffu)};
  if (magnitude >= 65520.0f) return {static_cast<unsigned short>(sign | 0x7c00u)};
  // The default rounding of nearbyint is to nearest, ties to even.
  if (magnitude < 6.103515625e-05f)
    return {static_cast<unsigned short>(sign | static_cast<unsigned>(std::nearbyint(std::ldexp(magnitude, 24))))};
  const unsigned rest = (bits & 0x7fffffffu) - (112u << 23);
  const unsigned rounded = rest + 0xfffu + (rest >> 13 & 1u);
  return {static_cast<unsigned short>(sign | rounded >> 13)};
}

inline float2 __half22float2(__half2 pair) { return {__half2float(pair.x), __half2float(pair.y)}; }
inline __half2 __floats2half2_rn(float low, float high) { return {__float2half_rn(low), __float2half_rn(high)}; }

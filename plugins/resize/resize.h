// The paper's resize: bilinear, antialiased on shrinking, as Pillow does it, to the bit.

#ifndef RESIZE_H
#define RESIZE_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// source [height, width, 3] -> target [target_height, target_width, 3], both RGB without gaps between the rows.
// Returns 0; 1 where a side is below 1 or above 65535, 2 where memory is short.
int32_t resize_rgb(const uint8_t* source, int64_t height, int64_t width, uint8_t* target, int64_t target_height,
                   int64_t target_width);

// What it runs on here: "vnni", "avx2" or "portable", the same bytes on each; the best one, unless another was set (for
// tests and benchmarks). Setting returns -1 for a path that does not run here.
const char* resize_cpu_path(void);
int32_t resize_set_cpu_path(const char* name);

#ifdef __cplusplus
}
#endif

#endif

// Multi-scale deformable attention: the C ABI that every adapter shares.
//
// Axes: N batch, S = sum of h_l*w_l, M heads, D channels of a head, Lq queries, L levels, P points of a level.
// All arrays are dense and row-major. Softmax, sampling locations and bilinear weights are computed inside, in float.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum MsdaType { MSDA_FLOAT32 = 0, MSDA_FLOAT16 = 1, MSDA_BFLOAT16 = 2 };

typedef struct MsdaParams {
  int64_t batch, pixels, heads, channels, queries, levels, points;
  int64_t reference_dim;          // R: 2 (x, y) or 4 (cx, cy, w, h)
  int64_t type;                   // MsdaType of value, sampling_offsets, attention_logits and the output
  const int64_t* spatial_shapes;  // [L, 2] (h, w)
  const void* value;              // [N, S, M, D]
  const float* reference_points;  // [N, Lq, L, R]
  const void* sampling_offsets;   // [N, Lq, M, L, P, 2]
  const void* attention_logits;   // [N, Lq, M, L*P]
} MsdaParams;

// L*P that the kernels' arrays hold.
#define MSDA_MAX_LEVEL_POINTS 256

// --- CPU: float32 and float16 ---
//
// The work is cut into independent units, so that the caller's own threads can share it: a call does those in
// [begin, end). Both return 0, or -1 when the parameters cannot be served.

// Units: the N*Lq rows of the output, each with all its heads.
int msda_forward_rows(const MsdaParams* params, int64_t begin, int64_t end,
                      void* output);  // [N, Lq, M*D], its rows written whole

// How many rows make a good piece of work: neighbouring queries share what they read, and threads are to end together.
int64_t msda_rows_per_block(const MsdaParams* params);

// float32 only. Units: the N*M heads, as the queries of one head add to the same values.
int msda_backward_f32(const MsdaParams* params, int64_t begin, int64_t end,
                      const float* grad_output,  // [N, Lq, M*D]
                      float* grad_value,         // [N, S, M, D], added to: zero it first
                      float* grad_locations,     // [N, Lq, M, L, P, 2] w.r.t. the locations in 0..1, written whole
                      float* grad_logits);       // [N, Lq, M, L*P], written whole

// The same with all units, on threads that the caller lends: `parallel` calls work(data) on so many threads and returns
// when they have. Its type is that of OpenMP's GOMP_parallel.
typedef void (*MsdaParallel)(void (*work)(void* data), void* data, unsigned threads, unsigned flags);
int msda_forward_cpu(const MsdaParams* params, void* output, MsdaParallel parallel, unsigned threads);
int msda_backward_cpu(const MsdaParams* params, const float* grad_output, float* grad_value, float* grad_locations,
                      float* grad_logits, MsdaParallel parallel, unsigned threads);

// What the forward pass runs on here: "avx512", "avx2" or "portable"; the best one, unless another was set (for tests
// and benchmarks). Setting returns -1 for a path that does not run here.
const char* msda_cpu_path(void);
int msda_set_cpu_path(const char* name);

// --- CUDA: float32, float16 and bfloat16; in libraries built with nvcc ---

// Every pointer is the device's, spatial_shapes too; the work is queued on the stream (a cudaStream_t). Returns a
// cudaError_t: that of the launch, or cudaErrorInvalidValue when the parameters cannot be served.
int msda_forward_cuda(const MsdaParams* params, void* output, void* stream);
// The same with spatial_shapes in the host's memory, read before the call returns.
int msda_forward_cuda_host_shapes(const MsdaParams* params, void* output, void* stream);
const char* msda_cuda_error(int error);  // its name and meaning

#ifdef __cplusplus
}
#endif

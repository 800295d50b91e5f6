// The convolution on a CPU: how it is cut into pieces. What is done to the blocks of a piece is in conv_cpu_blocks.inc.
//
// Every window is a product of [rows, depth] and [depth, K]. Of most, the rows are pixels of the output, gathered from
// the input. Of a 3x3 window of stride 1 they are tiles of 4x4 pixels, and there are 36 products: Winograd's.
#include "conv.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../cpu_path.h"
#include "conv_cores.h"

#define CONV_INLINE inline __attribute__((always_inline))

namespace {

constexpr int64_t kLanes = CONV_LANES, kChannels = CONV_CHANNELS;
constexpr int64_t kRows = 12;  // of a block
constexpr int64_t kTile = 4, kPatch = 6;  // pixels of a tile's side, and of what it reads
constexpr int64_t kElements = kPatch * kPatch;
constexpr int64_t kPieceFloats = 1 << 17;  // of a piece's gathered rows: half the second-level cache
constexpr int64_t kMostBlocks = 16, kSharedBlocks = 4;  // of a piece
constexpr int64_t kRoundBlocks = 16;  // whose values are shared
constexpr int64_t kPiecesPerThread = 8;  // at least so many where there is the work, that threads end together
constexpr int64_t kFewRows = 4;  // a block of fewer multiplies at half the speed
constexpr int64_t kManyWeights = 1 << 22;  // 16 MiB: more than a share of the last cache

// The points of Winograd's transforms are 0, +-a, +-b and infinity: these two keep rounding errors low, and in the
// transform of the input every factor is exact.
constexpr float kA = 0.625f, kB = 1.5f;

struct Job {
  ConvParams params;
  int64_t out_h, out_w;
  bool winograd;
  int64_t tiles_h, tiles_w;
  int64_t rows, depth;  // of the product
  int64_t blocks, block_rows;  // kRows, or fewer that threads get the same
  int64_t lane_groups;  // of kLanes output channels
  int64_t piece_blocks, piece_lane_groups, lane_pieces;
  int64_t at_once;  // blocks gathered before they are multiplied
  int64_t round_first, round_blocks;  // of what is done now: all blocks, or so many as share their values
  float* values;  // the tiles' of this round, where pieces share them; else null
  std::atomic<bool> failed{false};
};

// A thread's own memory, kept from call to call.
class Scratch {
 public:
  float* floats(int64_t count) {
    if (count > count_) {
      memory_.reset(static_cast<float*>(std::aligned_alloc(64, (count * sizeof(float) + 63) / 64 * 64)));
      count_ = memory_ ? count : 0;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(float* memory) const { std::free(memory); }
  };
  std::unique_ptr<float, Free> memory_;
  int64_t count_ = 0;
};

thread_local Scratch shared_values, piece_values, piece_products;

alignas(64) const float kZeros[CONV_MAX_CHANNELS] = {};  // what lies outside the picture

// --- blocks, once for each instruction set ---

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif
namespace avx512 {
constexpr int kWidth = 16, kStep = 12;
#include "conv_cpu_blocks.inc"
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace avx2 {
constexpr int kWidth = 8, kStep = 6;
#include "conv_cpu_blocks.inc"
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif

namespace portable {
constexpr int kWidth = 4, kStep = 6;
#include "conv_cpu_blocks.inc"
}  // namespace portable

struct Path {
  const char* name;
  bool (*runs_here)();
  void (*transform)(const Job& job, int64_t block, float* values);
  void (*piece)(const Job& job, int64_t row_piece, int64_t lane_piece, float* values, float* products);
};

constexpr Path kPaths[] = {
#if defined(__x86_64__)
    {"avx512", cpu::has_avx512, avx512::transform, avx512::piece},
    {"avx2", cpu::has_avx2, avx2::transform, avx2::piece},
#endif
    {"portable", cpu::runs_everywhere, portable::transform, portable::piece},
};

cpu::Chosen<Path>& chosen() {
  static cpu::Chosen<Path> path{kPaths};
  return path;
}

bool is_winograd(const ConvWindow& w) {
  return w.height == 3 && w.width == 3 && w.stride_h == 1 && w.stride_w == 1 && w.dilation_h == 1 && w.dilation_w == 1;
}

int64_t out_side(int64_t side, int64_t window, int64_t stride, int64_t dilation, int64_t pads) {
  const int64_t room = side + pads - dilation * (window - 1) - 1;
  return room < 0 ? 0 : room / stride + 1;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Floats of a block's gathered rows: every row has its place, the last block's too.
int64_t block_values(const Job& job) { return kRows * job.depth * (job.winograd ? kElements : 1); }

int64_t threads_here() {
  static const int64_t count = conv_cores("/sys/fs/cgroup");
  return count;
}

// Pixels: pieces are small enough that what one gathers stays in the cache. A piece of fewer output channels gathers
// its rows again, which costs little.
void cut_pixels(Job& job) {
  const int64_t pieces = kPiecesPerThread * threads_here();
  job.block_rows = kRows;
  job.blocks = ceil_div(job.rows, kRows);
  const int64_t fitting = std::max<int64_t>(1, kPieceFloats / block_values(job));
  job.piece_blocks = std::min({fitting, kMostBlocks, std::max<int64_t>(1, job.blocks / pieces)});
  const int64_t row_pieces = ceil_div(job.blocks, job.piece_blocks);
  const int64_t lane_pieces = std::min(job.lane_groups, ceil_div(pieces, row_pieces));
  job.piece_lane_groups = ceil_div(job.lane_groups, lane_pieces);
  const bool small_weights = job.piece_lane_groups * kLanes * job.depth <= kPieceFloats / 2;
  job.at_once = small_weights ? 1 : job.piece_blocks;
}

// Tiles: a piece is of all output channels, and threads share nothing that they write; false where there are too few
// tiles for that, or so many weights that each should be read by one thread only. Then the tiles are transformed first,
// and a piece is of some output channels.
bool cut_tiles(Job& job) {
  const int64_t threads = threads_here();
  const int64_t blocks = ceil_div(job.rows, kRows), even = ceil_div(blocks, threads) * threads;
  const bool few_weights = kElements * job.depth * job.params.out_channels <= kManyWeights;
  const bool own = job.rows >= kFewRows * threads && few_weights;
  job.block_rows = own && blocks < kPiecesPerThread * threads ? ceil_div(job.rows, even) : kRows;
  job.blocks = ceil_div(job.rows, job.block_rows);
  if (own) {
    const int64_t fitting = std::max<int64_t>(1, kPieceFloats / block_values(job));
    const int64_t share = std::max<int64_t>(1, job.blocks / (kPiecesPerThread * threads));
    job.piece_blocks = std::min({fitting, kMostBlocks, share});
    job.piece_lane_groups = job.lane_groups;
  } else {
    job.piece_blocks = std::min(job.blocks, kSharedBlocks);
    job.piece_lane_groups = 1;
  }
  return own;
}

void do_transform(void* data, size_t index) {
  const Job& job = *static_cast<const Job*>(data);
  const int64_t block = static_cast<int64_t>(index);
  float* values = job.values + block * block_values(job);
  chosen()->transform(job, job.round_first + block, values);
}

void do_piece(void* data, size_t index) {
  Job& job = *static_cast<Job*>(data);
  const int64_t row_piece = static_cast<int64_t>(index) / job.lane_pieces;
  const int64_t lane_piece = static_cast<int64_t>(index) % job.lane_pieces;
  float *values = nullptr, *products = nullptr;
  if (job.values == nullptr) values = piece_values.floats(job.piece_blocks * block_values(job));
  if (job.winograd) products = piece_products.floats(job.piece_blocks * kRows * kLanes * kElements);
  if ((job.values == nullptr && values == nullptr) || (job.winograd && products == nullptr)) {
    job.failed.store(true, std::memory_order_relaxed);
    return;
  }
  if (job.values != nullptr) values = job.values + row_piece * job.piece_blocks * block_values(job);
  chosen()->piece(job, row_piece, lane_piece, values, products);
}

void alone(void*, void (*work)(void* data, size_t index), size_t count, void* data) {
  for (size_t i = 0; i < count; ++i) work(data, i);
}

}  // namespace

extern "C" int conv_servable(int64_t in_channels, int64_t out_channels, const ConvWindow* window) {
  const ConvWindow& w = *window;
  const bool channels = in_channels > 0 && in_channels % kChannels == 0 && in_channels <= CONV_MAX_CHANNELS &&
                        out_channels > 0 && out_channels % kLanes == 0;
  const bool sides = w.height > 0 && w.width > 0 && w.stride_h > 0 && w.stride_w > 0 && w.dilation_h > 0 &&
                     w.dilation_w > 0 && w.pad_top >= 0 && w.pad_left >= 0 && w.pad_bottom >= 0 && w.pad_right >= 0;
  return channels && sides ? 0 : -1;
}

extern "C" int64_t conv_out_height(const ConvParams* p) {
  const ConvWindow& w = p->window;
  return out_side(p->height, w.height, w.stride_h, w.dilation_h, w.pad_top + w.pad_bottom);
}

extern "C" int64_t conv_out_width(const ConvParams* p) {
  const ConvWindow& w = p->window;
  return out_side(p->width, w.width, w.stride_w, w.dilation_w, w.pad_left + w.pad_right);
}

extern "C" int64_t conv_winograd_floats(int64_t in_channels, int64_t out_channels, const ConvWindow* window) {
  return is_winograd(*window) ? kElements * in_channels * out_channels : 0;
}

// [K/32, 3, 3, C, 32] -> [K/32, 36, C, 32], in double: the products are rounded once.
extern "C" void conv_winograd(int64_t in_channels, int64_t out_channels, const float* weight, float* transformed) {
  const double points[5] = {0, kA, -kA, kB, -kB};
  double factors[kPatch][3] = {{}, {}, {}, {}, {}, {0, 0, 1}};
  for (int i = 0; i < 5; ++i) {
    double scale = 1;
    for (int j = 0; j < 5; ++j)
      if (j != i) scale *= points[i] - points[j];
    for (int j = 0; j < 3; ++j) factors[i][j] = (j == 0 ? 1 : j == 1 ? points[i] : points[i] * points[i]) / scale;
  }
  const int64_t plane = in_channels * kLanes;
  for (int64_t at = 0; at < out_channels / kLanes * plane; at += kLanes) {
    const float* from = weight + at / plane * 9 * plane + at % plane;
    float* to = transformed + at / plane * kElements * plane + at % plane;
    double half[kPatch][3][kLanes];
    for (int i = 0; i < kPatch; ++i)
      for (int j = 0; j < 3; ++j)
        for (int lane = 0; lane < kLanes; ++lane)
          half[i][j][lane] = factors[i][0] * from[j * plane + lane] + factors[i][1] * from[(3 + j) * plane + lane] +
                             factors[i][2] * from[(6 + j) * plane + lane];
    for (int i = 0; i < kPatch; ++i)
      for (int j = 0; j < kPatch; ++j)
        for (int lane = 0; lane < kLanes; ++lane)
          to[(i * kPatch + j) * plane + lane] = static_cast<float>(
              half[i][0][lane] * factors[j][0] + half[i][1][lane] * factors[j][1] + half[i][2][lane] * factors[j][2]);
  }
}

extern "C" int conv_forward(const ConvParams* params, ConvForEach for_each, void* caller) {
  Job job{};
  job.params = *params;
  const ConvParams& p = job.params;
  job.out_h = conv_out_height(params);
  job.out_w = conv_out_width(params);
  job.winograd = is_winograd(p.window);
  job.tiles_h = ceil_div(job.out_h, kTile);
  job.tiles_w = ceil_div(job.out_w, kTile);
  job.rows = p.batch * (job.winograd ? job.tiles_h * job.tiles_w : job.out_h * job.out_w);
  job.depth = p.in_channels * (job.winograd ? 1 : p.window.height * p.window.width);
  job.lane_groups = p.out_channels / kLanes;
  if (job.rows <= 0) return 0;
  if (for_each == nullptr) for_each = alone;

  bool own = true;
  if (job.winograd) own = cut_tiles(job);
  else cut_pixels(job);
  job.lane_pieces = ceil_div(job.lane_groups, job.piece_lane_groups);
  if (!own) {
    job.values = shared_values.floats(std::min(job.blocks, kRoundBlocks) * block_values(job));
    if (job.values == nullptr) return -1;
  }
  const int64_t round = own ? job.blocks : kRoundBlocks;
  for (job.round_first = 0; job.round_first < job.blocks; job.round_first += round) {
    job.round_blocks = std::min(round, job.blocks - job.round_first);
    if (!own) for_each(caller, do_transform, static_cast<size_t>(job.round_blocks), &job);
    const int64_t pieces = ceil_div(job.round_blocks, job.piece_blocks) * job.lane_pieces;
    for_each(caller, do_piece, static_cast<size_t>(pieces), &job);
  }
  return job.failed.load(std::memory_order_relaxed) ? -1 : 0;
}

extern "C" int64_t conv_cores(const char* cgroup) { return cores_here(cgroup); }

extern "C" const char* conv_cpu_path(void) { return chosen()->name; }

extern "C" int conv_set_cpu_path(const char* name) { return chosen().choose(name); }

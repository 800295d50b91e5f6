// Two passes, along the rows and then down the columns, with 8 bits between them and weights of 22 bits after the
// point. Rows are taken along just before they are needed, so what lies between the passes stays in the cache. How a
// pass is computed is one of the paths' business; all sums are exact, so every path gives the same bytes.

#include "resize.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <vector>

#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "../cpu_path.h"

namespace {

constexpr int kChannels = 3;
constexpr int kFraction = 32 - 8 - 2;  // bits: a sum of weights near 1 times 255 stays within 32, signed
constexpr int32_t kOne = 1 << kFraction, kHalf = kOne / 2;
constexpr int64_t kLongestSide = 65535;
constexpr int64_t kBlock = 32;        // bytes that a kernel takes at once
constexpr int64_t kRowsAtOnce = 8;    // taken along together: what they share is loaded once

// Which pixels of a line each pixel of the new line is made of, and by what weights.
struct Taps {
  int64_t from, to;
  int room;      // for each pixel's weights: an even number, zeros beyond those used
  int most = 0;  // taps of any pixel
  bool blends = true;  // every pixel is of at most two, whose weights are 1 together, and begins at most one further
  std::vector<int> first, used;  // [to]
  std::vector<int32_t> weights;  // [to, room]

  Taps(int64_t from, int64_t to) : from(from), to(to), first(to), used(to) {
    const double scale = double(from) / double(to);
    const double stretch = std::max(scale, 1.0);  // the triangle's half width, in pixels of the old line
    const double narrow = 1.0 / stretch;
    room = int(std::ceil(stretch)) * 2 + 2;
    weights.assign(size_t(to) * room, 0);
    std::vector<double> exact(room);
    for (int64_t pixel = 0; pixel < to; ++pixel) {
      const double centre = (double(pixel) + 0.5) * scale;
      const int begin = std::max(int(centre - stretch + 0.5), 0);
      const int end = std::min(int(centre + stretch + 0.5), int(from));
      double sum = 0;
      for (int tap = 0; tap < end - begin; ++tap) {
        const double distance = std::abs((double(tap + begin) - centre + 0.5) * narrow);
        exact[tap] = std::max(1.0 - distance, 0.0);
        sum += exact[tap];
      }
      int32_t* weight = &weights[pixel * room];
      if (sum == 0) sum = 1;
      for (int tap = 0; tap < end - begin; ++tap) weight[tap] = int32_t(exact[tap] / sum * kOne + 0.5);
      first[pixel] = begin;
      used[pixel] = end - begin;
      most = std::max(most, used[pixel]);
      blends = blends && used[pixel] <= 2 && weight[0] + weight[1] == kOne &&
               begin - first[std::max(pixel - 1, int64_t{0})] <= 1;
    }
  }
};

uint8_t to_byte(int32_t sum) { return uint8_t(std::clamp(sum >> kFraction, 0, 255)); }

namespace portable {

class Across {
 public:
  explicit Across(const Taps& taps) : taps_(taps) {}

  void operator()(const uint8_t* const* from, uint8_t* const* to, int rows) const {
    for (int row = 0; row < rows; ++row) {
      uint8_t* target = to[row];
      for (int64_t pixel = 0; pixel < taps_.to; ++pixel, target += kChannels) {
        const int32_t* weights = &taps_.weights[pixel * taps_.room];
        const uint8_t* source = from[row] + int64_t(taps_.first[pixel]) * kChannels;
        int32_t sums[kChannels] = {kHalf, kHalf, kHalf};
        for (int tap = 0; tap < taps_.used[pixel]; ++tap, source += kChannels)
          for (int channel = 0; channel < kChannels; ++channel) sums[channel] += source[channel] * weights[tap];
        for (int channel = 0; channel < kChannels; ++channel) target[channel] = to_byte(sums[channel]);
      }
    }
  }

 private:
  const Taps& taps_;
};

class Down {
 public:
  explicit Down(const Taps& taps) : taps_(taps) {}

  void operator()(int64_t row, const uint8_t* const* rows, uint8_t* target, int64_t bytes) const {
    const int32_t* weights = &taps_.weights[row * taps_.room];
    for (int64_t at = 0; at < bytes; at += kBlock) {
      int32_t sums[kBlock];
      for (int lane = 0; lane < kBlock; ++lane) sums[lane] = kHalf;
      for (int tap = 0; tap < taps_.used[row]; ++tap)
        for (int lane = 0; lane < kBlock; ++lane) sums[lane] += rows[tap][at + lane] * weights[tap];
      const int64_t count = std::min(kBlock, bytes - at);
      for (int lane = 0; lane < count; ++lane) target[at + lane] = to_byte(sums[lane]);
    }
  }

 private:
  const Taps& taps_;
};

}  // namespace portable

#ifdef __x86_64__
namespace avx2 {
#include "resize_avx2.inc"
}  // namespace avx2

#define RESIZE_VNNI
namespace vnni {
#include "resize_avx2.inc"
}  // namespace vnni
#endif

template <typename Across, typename Down>
void resize(const uint8_t* source, int64_t height, int64_t width, uint8_t* target, int64_t target_height,
            int64_t target_width) {
  const Taps columns(width, target_width), lines(height, target_height);
  const Across across(columns);
  const Down down(lines);
  const int64_t source_bytes = width * kChannels, bytes = target_width * kChannels;

  // Kernels read taps of no weight, too, beyond a row's end or the last row: the last rows are copies with room behind.
  const int64_t reach = (columns.most + 1) * kChannels + kBlock;
  const int64_t copied = std::min(height, (reach - 1) / source_bytes + 1), own = height - copied;
  std::vector<uint8_t> copies(size_t(copied * source_bytes + reach));
  std::memcpy(copies.data(), source + own * source_bytes, size_t(copied * source_bytes));
  std::vector<const uint8_t*> from(height + lines.most + 1, copies.data());
  for (int64_t row = 0; row < height; ++row)
    from[row] = row < own ? source + row * source_bytes : copies.data() + (row - own) * source_bytes;

  // Rows taken along have their places in turn, where a kernel writes whole blocks.
  const int64_t places = lines.most + kRowsAtOnce, place_bytes = (bytes / kBlock + 2) * kBlock;
  std::vector<uint8_t> between(size_t(places * place_bytes));
  const bool same_width = width == target_width;
  std::vector<uint8_t*> to(same_width ? 0 : from.size());
  for (size_t row = 0; row < to.size(); ++row) to[row] = between.data() + int64_t(row) % places * place_bytes;
  const uint8_t* const* rows = same_width ? from.data() : to.data();
  int64_t taken = same_width ? height : 0;
  for (int64_t row = 0; row < target_height; ++row, target += bytes) {
    const int64_t first = lines.first[row], end = first + lines.used[row];
    if (taken < end) {
      const int64_t until = std::min(height, std::max(end, taken + kRowsAtOnce));
      across(from.data() + taken, to.data() + taken, int(until - taken));
      taken = until;
    }
    if (lines.weights[row * lines.room] == kOne) std::memcpy(target, rows[first], size_t(bytes));
    else down(row, rows + first, target, bytes);
  }
}

struct Path {
  const char* name;
  bool (*runs_here)();
  void (*resize)(const uint8_t* source, int64_t height, int64_t width, uint8_t* target, int64_t target_height,
                 int64_t target_width);
};

constexpr Path kPaths[] = {
#ifdef __x86_64__
    {"vnni", cpu::has_avx512_vnni, resize<vnni::Across, vnni::Down>},
    {"avx2", cpu::has_avx2, resize<avx2::Across, avx2::Down>},
#endif
    {"portable", cpu::runs_everywhere, resize<portable::Across, portable::Down>},
};

cpu::Chosen<Path>& chosen() {
  static cpu::Chosen<Path> path{kPaths};
  return path;
}

bool is_side(int64_t pixels) { return 1 <= pixels && pixels <= kLongestSide; }

}  // namespace

extern "C" int32_t resize_rgb(const uint8_t* source, int64_t height, int64_t width, uint8_t* target,
                              int64_t target_height, int64_t target_width) {
  if (!is_side(height) || !is_side(width) || !is_side(target_height) || !is_side(target_width)) return 1;
  try {
    chosen()->resize(source, height, width, target, target_height, target_width);
  } catch (const std::bad_alloc&) {
    return 2;
  }
  return 0;
}

extern "C" const char* resize_cpu_path(void) { return chosen()->name; }

extern "C" int32_t resize_set_cpu_path(const char* name) { return chosen().choose(name); }

// Which of a kernel's paths is taken: the first of its table that this processor can run, until one is chosen by name.
#ifndef DDETR_CPU_PATH_H_
#define DDETR_CPU_PATH_H_

#include <atomic>
#include <cstddef>
#include <cstring>

namespace cpu {

#if defined(__x86_64__)
inline bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

inline bool has_avx512_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }

inline bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#endif

inline bool runs_everywhere() { return true; }

// Of a table of paths, each with a name and with runs_here(), the last of which runs everywhere.
template <typename Path>
class Chosen {
 public:
  template <std::size_t count>
  explicit Chosen(const Path (&paths)[count]) : begin_(paths), end_(paths + count) {
    const Path* path = paths;
    while (!path->runs_here()) ++path;
    path_.store(path, std::memory_order_relaxed);
  }

  const Path* operator->() const { return path_.load(std::memory_order_relaxed); }

  // 0, or -1 where there is none of this name, or it does not run here.
  int choose(const char* name) {
    for (const Path* path = begin_; path != end_; ++path) {
      if (std::strcmp(path->name, name) != 0 || !path->runs_here()) continue;
      path_.store(path, std::memory_order_relaxed);
      return 0;
    }
    return -1;
  }

 private:
  const Path *begin_, *end_;
  std::atomic<const Path*> path_;
};

}  // namespace cpu

#endif  // DDETR_CPU_PATH_H_

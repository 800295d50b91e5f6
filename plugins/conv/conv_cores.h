// How many cores this process may use: by its affinity, and as many as its container's quota pays for.
#pragma once

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <string>
#include <thread>

#ifdef __linux__
#include <sched.h>
#endif

inline int64_t cores_by_affinity() {
#ifdef __linux__
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof(allowed), &allowed) == 0) return CPU_COUNT(&allowed);
#endif
  return std::max<int64_t>(1, std::thread::hardware_concurrency());
}

// `cgroup` is where control groups are mounted, of version 2 or 1. A quota of "max" or -1 is none.
inline int64_t cores_here(const std::string& cgroup) {
  const int64_t cores = cores_by_affinity();
  int64_t quota = 0, period = 0;  // of time, in microseconds
  if (!(std::ifstream(cgroup + "/cpu.max") >> quota >> period)) {
    std::ifstream(cgroup + "/cpu/cpu.cfs_quota_us") >> quota;
    std::ifstream(cgroup + "/cpu/cpu.cfs_period_us") >> period;
  }
  return quota > 0 && period > 0 ? std::min(cores, (quota - 1) / period + 1) : cores;
}

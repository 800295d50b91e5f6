"""How many CPU cores this process may use, and what they can do."""

import math
import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_CPU_INFO = Path("/proc/cpuinfo")


def available_cores(cgroup: Path = _CGROUP) -> int:
    """Cores by affinity and by the container's quota, at least 1.

    A container limited to 2 of 64 cores that starts 64 threads is throttled most of the time.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for files in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):  # control groups of version 2, and 1
        try:
            quota, period = " ".join((cgroup / file).read_text(encoding="ascii") for file in files).split()
            if quota not in {"max", "-1"}:
                cores = min(cores, math.ceil(int(quota) / int(period)))
        except (OSError, ValueError, ZeroDivisionError):
            continue  # none of this version: no quota to heed
    return max(1, cores)


def sums_bytes_exactly(cpu_info: Path = _CPU_INFO) -> bool:
    """Whether ONNX Runtime's 8-bit kernels are exact here; taken for granted where nobody says otherwise.

    On x86 without VNNI they add pairs of products in 16 bits, where large ones saturate: other answers than those
    that a graph in integers was measured by.
    """
    try:
        lines = cpu_info.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return True
    flags = next((set(line.split()) for line in lines if line.startswith("flags")), None)
    return flags is None or bool(flags & {"avx512_vnni", "avx_vnni"})

"""The machine a figure was measured on, in a line."""

import os
import platform
from pathlib import Path


def machine() -> str:
    """Processor, cores and load, as found here."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    name = names[0] if names else platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0))
    return f"{cores} cores of {name}, load {os.getloadavg()[0]:.1f}, Python {platform.python_version()}"

"""The machine that the load comes from, and the CPU time of a process on it."""

import os
import platform
import socket
from pathlib import Path
from urllib.parse import urlsplit

from loadtest.report import Host


def this_host(cores: int) -> Host:
    """This machine; `cores` are those that may be used."""
    return Host(
        cpu=_cpu_name(),
        cores=cores,
        memory_bytes=_memory_bytes(),
        load_average=round(os.getloadavg()[0], 2),
        platform=platform.platform(),
        python=platform.python_version(),
    )


def is_this_host(url: str) -> bool:
    """Whether the host of `url` is this machine: an address of one's own, and no other, can be bound."""
    parts = urlsplit(url)
    try:
        addresses = socket.getaddrinfo(parts.hostname, None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    for family, kind, protocol, _, address in addresses:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.bind((address[0], 0))
                return True
        except OSError:
            continue
    return False


def cpu_seconds(pid: int | None) -> float | None:
    """CPU time that process has taken so far, all its threads together; None where that cannot be read."""
    if pid is None:
        return None
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The second field, the command, stands in parentheses and may hold spaces. utime and stime are fields 14 and 15.
    fields = stat.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        return None

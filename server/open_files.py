"""The files that the process may have open, of which each connection is one."""

import logging
import math
import resource
import time
from contextlib import suppress

logger = logging.getLogger("ddetr.run")

_KEPT_SHARE = 0.1
"""Not for connections. If they take the last, and a thread opens a file just then, uvloop closes the listener for good,
and says nothing."""

_WARN_EVERY_S = 60.0

_warned_s = -math.inf


def allow_most() -> None:
    """Raise the limit as far as the process may. Left alone where the system will not have it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # macOS: "unlimited" is none that it takes
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def run_out(newest: int) -> bool:
    """Whether a new connection with this descriptor is one too many; a warning says so, once a minute at most.

    A descriptor is the lowest number that is free, so all below it are in use.
    """
    global _warned_s
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most == resource.RLIM_INFINITY or newest < (1 - _KEPT_SHARE) * most:
        return False
    now_s = time.monotonic()
    if now_s - _warned_s >= _WARN_EVERY_S:
        _warned_s = now_s
        logger.warning(
            "%d files are open and %d may: new connections are closed at once. Raise the limit (ulimit -Hn, systemd's "
            "LimitNOFILE=, docker's --ulimit nofile=), or let a proxy hold the clients' connections",
            newest,
            most,
        )
    return True

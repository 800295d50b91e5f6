"""A server of one's own on a free port of this machine, for as long as a `with` lasts."""

import http.client
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

from loadtest.errors import ServerNotStarted

START_TIMEOUT_S = 300.0  # an r50 on a CPU warms for a while
STOP_TIMEOUT_S = 60.0
_POLL_S = 0.05
_LOG_LINES = 40

# Never through a proxy, whatever the environment says: it is this machine.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class ServerProcess:
    """A server that is ready."""

    url: str
    process: "subprocess.Popen[bytes]"

    @property
    def pid(self) -> int:
        """Of the server itself: it has no children."""
        return self.process.pid


@contextmanager
def serving(flags: Sequence[str], environment: Mapping[str, str] | None = None) -> Iterator[ServerProcess]:
    """`ddetr serve` with these flags, and variables beside those of this process, from ready to drained.

    Raises ServerNotStarted with the end of its log.
    """
    port = free_port()
    # A metrics port of the environment may be that of a server which is in use.
    place = ["--host", "127.0.0.1", "--port", str(port), "--metrics-port", "0"]
    command = [sys.executable, "-m", "cli.main", "serve", *flags, *place]
    variables = {"DDETR_LOG_LEVEL": "warning", "DDETR_LOG_FORMAT": "text", **os.environ, **(environment or {})}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, env=variables, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            url = f"http://127.0.0.1:{port}"
            wait_until_ready(url, process, log)
            yield ServerProcess(url, process)
        finally:
            stop(process)


def wait_until_ready(url: str, process: "subprocess.Popen[bytes]", log: IO[bytes]) -> None:
    """Until the server at `url`, which `process` starts, says so. Raises ServerNotStarted with the end of its log."""
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while not _is_ready(url):
        status = process.poll()
        if status is not None:
            raise ServerNotStarted(f"the server ended with status {status} before it was ready:\n{tail(log)}")
        if time.monotonic() > deadline_s:
            raise ServerNotStarted(f"the server was not ready after {START_TIMEOUT_S:.0f} s:\n{tail(log)}")
        time.sleep(_POLL_S)


def _is_ready(url: str) -> bool:
    try:
        with _OPENER.open(f"{url}/readyz", timeout=2) as response:
            return b'"ok"' in response.read()  # not what a proxy before it may say
    except urllib.error.HTTPError as error:
        error.close()
        return False
    except (OSError, http.client.HTTPException):
        return False


def stop(process: "subprocess.Popen[Any]") -> None:
    """SIGTERM, and time to finish; then SIGKILL."""
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def tail(log: IO[bytes]) -> str:
    """The last lines of a log that is open here."""
    log.seek(0)
    return "\n".join(log.read().decode("utf-8", "replace").splitlines()[-_LOG_LINES:])


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port

"""A server process under attack: what an attack is answered, what it costs in memory, and how a neighbour fares."""

import http.client
import re
import select
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import orjson

from tests.server.hostile import Attack
from tests.server.pictures import RED, encode, rectangle

ROOT = Path(__file__).parents[2]

BODY_TIMEOUT_MS = 3000

_SERVE = """
import sys
from server.run import serve
from server.settings import Settings
from tests.server.fake_engine import FakeEngine

port, body_timeout_ms, *max_body_bytes = map(int, sys.argv[1:])
settings = Settings(
    port=port,
    bundle="none",
    body_timeout_ms=body_timeout_ms,
    stall_timeout_ms=60_000,  # a machine that is busy with others is no reason to restart an engine
    log_level="warning",
    **({"max_body_bytes": max_body_bytes[0]} if max_body_bytes else {}),
)
sys.exit(serve(settings, FakeEngine()))
"""
_START_TIMEOUT_S = 60.0
_ANSWER_TIMEOUT_S = 60.0
_NEIGHBOUR_PAUSE_S = 0.01


@dataclass(frozen=True)
class Result:
    """What came of an attack."""

    status: int
    code: str
    message: str
    ms: float  # until the answer
    growth_mb: float  # of the process's memory at its most, over what it had before
    neighbour_ms: float  # slowest answer to a normal request beside it


class Siege:
    """A server, and a neighbour who sends it a normal request over and over, for as long as a `with` lasts.

    The server has its default limits, if `max_body_bytes` is not given.
    """

    def __init__(self, max_body_bytes: int | None = None) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        limit = [] if max_body_bytes is None else [str(max_body_bytes)]
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the siege
        self.process = subprocess.Popen(
            [sys.executable, "-c", _SERVE, str(self.port), str(BODY_TIMEOUT_MS), *limit],
            cwd=ROOT,
            env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stderr=self._log,
        )
        self._over = threading.Event()
        self._neighbour = threading.Thread(target=self._live, daemon=True)
        self._picture = encode(rectangle(RED), "JPEG", quality=95)
        self._lock = threading.Lock()
        self._since_s = 0.0
        self._latencies_s: list[float] = []
        self._failure: str | None = None

    def __enter__(self) -> Self:
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        while not self._is_ready():
            if self.process.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError(
                    f"the server did not become ready; exit status {self.process.poll()}; {self._log_tail()}"
                )
            time.sleep(0.05)
        self._neighbour.start()
        self._await_neighbour(20)  # warm: threads, caches, Pillow's plugins
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._neighbour.join(timeout=10)
        self.process.terminate()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._log.close()

    def attack(self, attack: Attack) -> Result:
        """Carry out `attack`, and wait until the neighbour has had answers during it or after it."""
        self._await_neighbour(2)
        pages = attack.pieces()  # made before the clock starts
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")  # VmHWM begins anew
        before_kb = self._memory_kb("VmRSS")
        started_s = time.monotonic()
        with self._lock:
            self._since_s, self._latencies_s = started_s, []
        status, content = self._send(pages)
        ms = (time.monotonic() - started_s) * 1e3
        self._await_neighbour(2)
        with self._lock:
            neighbour_s = max(self._latencies_s)
        growth_mb = (self._memory_kb("VmHWM") - before_kb) / 1024
        code, message = _error_of(content)
        return Result(status, code, message, ms, growth_mb, neighbour_s * 1e3)

    def calm_ms(self) -> float:
        """The neighbour's median latency with nobody else there."""
        with self._lock:
            self._latencies_s = []
        self._await_neighbour(20)
        with self._lock:
            return statistics.median(self._latencies_s) * 1e3

    def _is_ready(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=2)
        try:
            connection.request("GET", "/readyz")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

    def _memory_kb(self, name: str) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        found = re.search(rf"^{name}:\s+(\d+) kB", status, re.MULTILINE)
        if found is None:
            raise RuntimeError(f"no {name}: the server has ended, exit status {self.process.poll()}")
        return int(found[1])

    def _send(self, pieces: Iterator[bytes]) -> tuple[int, bytes]:
        """Send until there is an answer or nothing more to send; the answer."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=_ANSWER_TIMEOUT_S) as connection:
            for piece in pieces:
                if select.select([connection], [], [], 0)[0]:
                    break
                try:
                    connection.sendall(piece)
                except OSError:
                    break  # the server has answered and closed
            with closing(http.client.HTTPResponse(connection, method="POST")) as response:
                try:
                    response.begin()
                    return response.status, response.read()
                except (OSError, http.client.HTTPException) as error:
                    return 0, orjson.dumps({"error": {"code": "no answer", "message": repr(error)}})

    def _log_tail(self) -> str:
        self._log.seek(0)
        return self._log.read()[-4000:].decode("utf-8", "replace")

    def _live(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=_ANSWER_TIMEOUT_S)
        while not self._over.wait(_NEIGHBOUR_PAUSE_S):
            started_s = time.monotonic()
            try:
                connection.request("POST", "/detect", self._picture, {"Content-Type": "image/jpeg"})
                response = connection.getresponse()
                content = response.read()
            except (OSError, http.client.HTTPException) as error:
                self._failure = repr(error)
                connection.close()
                continue
            if response.status != 200:
                self._failure = f"{response.status} {content[:500]!r}"
            with self._lock:
                # Of what began before the attack, only the part beside it.
                self._latencies_s.append(time.monotonic() - max(started_s, self._since_s))
        connection.close()

    def _await_neighbour(self, answers: int) -> None:
        with self._lock:
            wanted = len(self._latencies_s) + answers
        deadline_s = time.monotonic() + _ANSWER_TIMEOUT_S
        while True:
            if self._failure is not None:
                raise RuntimeError(f"a normal request was answered {self._failure}; {self._log_tail()}")
            with self._lock:
                if len(self._latencies_s) >= wanted:
                    return
            if time.monotonic() > deadline_s:
                raise RuntimeError("a normal request gets no answer any more")
            time.sleep(0.002)


def _error_of(content: bytes) -> tuple[str, str]:
    try:
        document = orjson.loads(content)
    except orjson.JSONDecodeError:
        return "", content[:200].decode("utf-8", "replace")
    if "error" in document:
        return document["error"]["code"], document["error"]["message"]
    for image in document.get("images", ()):
        if "error" in image:
            return image["error"]["code"], image["error"]["message"]
    return "", ""

"""A client that saturates a server and takes as little CPU time for it as Python can: requests are made beforehand,
answers are only measured. (`ddetr bench` takes more than twice as much; beside a server on two cores that shows.)

For benchmarks.saturation. For every line `WARMUP DURATION` (seconds) on standard input it prints "begun" when the
warm-up ends, and a line of JSON when the duration has: `answers`, `failed`, `seconds`, `cpu_s`, `p50_ms`, `p99_ms`.
"""

import argparse
import json
import re
import selectors
import socket
import sys
import time
from urllib.parse import urlsplit

from loadtest.payload import drawn
from loadtest.report import percentile

LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
RECEIVE_BYTES = 1 << 16
SEND_BUFFER_BYTES = 1 << 20  # a request fits: sending never waits


class Connection:
    """One request at a time."""

    def __init__(self, host: str, port: int) -> None:
        self.socket = socket.create_connection((host, port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        self.sent_s = 0.0
        self._answer = b""
        self._expected = 0  # bytes of the whole answer; 0 while its header is not complete

    def send(self, request: bytes) -> None:
        """Send the next request."""
        self._answer, self._expected = b"", 0
        self.sent_s = time.perf_counter()
        self.socket.sendall(request)

    def receive(self) -> bool | None:
        """Take what has come. Whether the answer is one with boxes; None while it is not complete."""
        received = self.socket.recv(RECEIVE_BYTES)
        if not received:
            raise ConnectionError("the server closed a connection")
        self._answer += received
        if not self._expected:
            end = self._answer.find(b"\r\n\r\n")
            if end < 0:
                return None
            length = LENGTH.search(self._answer, 0, end + 2)
            if length is None:
                raise ValueError(f"an answer without Content-Length: {self._answer[:200]!r}")
            self._expected = end + 4 + int(length[1])
        if len(self._answer) < self._expected:
            return None
        return self._answer.startswith(b"HTTP/1.1 200 ")


def main() -> int:
    """Load the server on request until standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument("--clients", type=int, required=True)
    parser.add_argument("--pictures", type=int, default=16)
    args = parser.parse_args()
    parts = urlsplit(args.url)
    host, port = parts.hostname or "127.0.0.1", parts.port or 80
    requests = []
    for payload in drawn(args.pictures, seed=0):
        head = (
            f"POST /detect HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: {payload.media_type}\r\n"
            f"Content-Length: {len(payload.body)}\r\n\r\n"
        )
        requests.append(head.encode() + payload.body)
    print("ready", flush=True)
    for line in sys.stdin:
        warmup_s, duration_s = map(float, line.split())
        saturate(host, port, requests, args.clients, warmup_s, duration_s)
    return 0


def saturate(host: str, port: int, requests: list[bytes], clients: int, warmup_s: float, duration_s: float) -> None:
    """Closed loop over new connections; what came within the duration is printed when it is over."""
    selector = selectors.DefaultSelector()
    connections = [Connection(host, port) for _ in range(clients)]
    sent = 0
    for connection in connections:
        selector.register(connection.socket, selectors.EVENT_READ, connection)
        connection.send(requests[sent % len(requests)])
        sent += 1
    begins_s = time.perf_counter() + warmup_s
    began_s = began_cpu_s = 0.0
    failed = 0
    latencies_ms: list[float] = []
    while True:
        ready = selector.select(timeout=1.0)
        now_s = time.perf_counter()
        if not began_s and now_s >= begins_s:
            began_s, began_cpu_s = now_s, time.process_time()
            print("begun", flush=True)
        for key, _ in ready:
            connection = key.data
            ok = connection.receive()
            if ok is None:
                continue
            if began_s:
                failed += not ok
                latencies_ms.append((time.perf_counter() - connection.sent_s) * 1e3)
            connection.send(requests[sent % len(requests)])
            sent += 1
        if began_s and now_s >= began_s + duration_s:
            break
    ordered = sorted(latencies_ms)
    found = {
        "answers": len(ordered) - failed,
        "failed": failed,
        "seconds": time.perf_counter() - began_s,
        "cpu_s": time.process_time() - began_cpu_s,
        "p50_ms": percentile(ordered, 50) if ordered else 0.0,
        "p99_ms": percentile(ordered, 99) if ordered else 0.0,
    }
    print(json.dumps(found), flush=True)
    for connection in connections:
        connection.socket.close()
    selector.close()


if __name__ == "__main__":
    raise SystemExit(main())

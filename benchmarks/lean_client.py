"""Requests to /detect for as little CPU time as Python can; `ddetr bench` can do more: any server, TLS, keys.

Beside a server on the same two cores a client's millisecond is one that the engine does not get: so this is one thread,
sockets and `epoll`. Answers must have a Content-Length, as all of `ddetr serve` have. Connecting and sending wait; that
takes no time where the server is on this machine and a request fits into the socket's buffer. Latencies count from when
a request was due, whatever made it late.
"""

import heapq
import math
import re
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import urlsplit

from loadtest.arrivals import Arrival
from loadtest.client import DISCONNECTED, OK, REFUSED, TIMEOUT, error_code
from loadtest.payload import Payload

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_CLOSE = re.compile(rb"\r\nconnection: *close", re.IGNORECASE)
_RETRY_AFTER = re.compile(rb"\r\nretry-after: *(\d+)", re.IGNORECASE)
_LONGEST_IDLE_S = 4.0  # uvicorn closes a connection that idles for 5 s
_SEND_BUFFER_BYTES = 1 << 20
_PATIENCE_S = 60.0


class _Asked(NamedTuple):
    client: int
    tries: int
    payload: int
    due_s: float


@dataclass(frozen=True, slots=True)
class Try:
    """One request, of one client's several. Seconds since the run's start."""

    client: int
    tries: int  # of this client, this one included
    payload: int
    due_s: float
    done_s: float
    outcome: str  # as loadtest.client has them
    retry_after_s: float | None = None

    @property
    def latency_ms(self) -> float:
        """From the moment it was due to the answer's end."""
        return (self.done_s - self.due_s) * 1e3


class _Connection:
    """One request at a time."""

    __slots__ = ("answer", "asked", "idle_since_s", "socket")

    def __init__(self, address: tuple[str, int]) -> None:
        self.socket = socket.create_connection(address, timeout=_PATIENCE_S)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.asked: _Asked | None = None
        self.answer = b""
        self.idle_since_s = 0.0

    def receive(self) -> bytes | None:
        """The answer if it is whole, b"" if the connection ended before; None if more has to come."""
        try:
            data = self.socket.recv(65536)
        except OSError:
            data = b""
        if not data:
            return b""
        answer = self.answer = self.answer + data if self.answer else data
        head = answer.find(b"\r\n\r\n")
        if head < 0:
            return None
        length = _LENGTH.search(answer, 0, head)
        if length is None:
            raise ValueError(f"an answer without Content-Length: {answer[:200]!r}")
        return answer if len(answer) >= head + 4 + int(length[1]) else None


class LeanClient:
    """As many connections as there are requests on their way; kept for the next."""

    def __init__(self, url: str, payloads: Sequence[Payload], timeout_ms: float | None = None) -> None:
        parts = urlsplit(url)
        self._address = parts.hostname or "127.0.0.1", parts.port or 80
        more = "" if timeout_ms is None else f"X-Timeout-Ms: {timeout_ms:g}\r\n"
        self._requests = [
            (
                f"POST /detect HTTP/1.1\r\nHost: {self._address[0]}:{self._address[1]}\r\n"
                f"Content-Type: {payload.media_type}\r\nContent-Length: {len(payload.body)}\r\n{more}\r\n"
            ).encode()
            + payload.body
            for payload in payloads
        ]

    def run(self, arrivals: Iterable[Arrival], again: Callable[[Try], Arrival | None]) -> list[Try]:
        """All tries, as they ended. Every arrival is a client, who is told what became of each and may come `again`.

        Arrivals come in the order of their times; these are seconds since the start, as in tries.
        """
        return _Run(self._address, self._requests, again).see_through(arrivals)


class _Run:
    def __init__(
        self, address: tuple[str, int], requests: Sequence[bytes], again: Callable[[Try], Arrival | None]
    ) -> None:
        self._address = address
        self._requests = requests
        self._again = again
        self._tries: list[Try] = []
        self._due: list[tuple[float, _Asked]] = []  # heap
        self._connections: dict[int, _Connection] = {}  # by file descriptor
        self._idle: deque[_Connection] = deque()  # used longest ago first
        self._asking = 0
        self._poll = select.epoll()
        self._start_s = time.monotonic()

    def see_through(self, arrivals: Iterable[Arrival]) -> list[Try]:
        newcomers = (_Asked(client, 1, arrival.payload, arrival.at_s) for client, arrival in enumerate(arrivals))
        newcomer = next(newcomers, None)
        try:
            while newcomer or self._due or self._asking:
                now_s = self._now_s()
                if newcomer and newcomer.due_s <= now_s:
                    self._ask(newcomer)
                    newcomer = next(newcomers, None)
                elif self._due and self._due[0][0] <= now_s:
                    self._ask(heapq.heappop(self._due)[1])
                else:
                    soonest_s = min(
                        now_s + _PATIENCE_S,
                        newcomer.due_s if newcomer else math.inf,
                        self._due[0][0] if self._due else math.inf,
                    )
                    self._receive(soonest_s - now_s)
        finally:
            for connection in self._connections.values():
                connection.socket.close()
            self._poll.close()
        return self._tries

    def _ask(self, asked: _Asked) -> None:
        try:
            connection = self._connection()
        except OSError:
            self._tell(asked, REFUSED)
            return
        connection.asked, connection.answer = asked, b""
        self._asking += 1
        try:
            connection.socket.sendall(self._requests[asked.payload])
        except OSError:
            self._end(connection, DISCONNECTED)

    def _receive(self, within_s: float) -> None:
        ready = self._poll.poll(within_s)
        for number, _ in ready:
            connection = self._connections[number]
            answer = connection.receive()
            if answer == b"" or (answer and connection.asked is None):
                self._end(connection, DISCONNECTED)
            elif answer:
                self._hear(connection, answer)
        if not ready and self._asking:
            late_s = self._now_s() - _PATIENCE_S
            for connection in [*self._connections.values()]:
                if connection.asked is not None and connection.asked.due_s < late_s:
                    self._end(connection, TIMEOUT)

    def _hear(self, connection: _Connection, answer: bytes) -> None:
        head, _, content = answer.partition(b"\r\n\r\n")
        retry_after = _RETRY_AFTER.search(head)
        ok = head.startswith(b"HTTP/1.1 200 ")
        outcome = OK if ok else f"{head[9:12].decode()} {error_code(content)}".rstrip()
        asked, connection.asked = connection.asked, None
        assert asked is not None
        self._asking -= 1
        if _CLOSE.search(head):
            self._close(connection)
        else:
            connection.idle_since_s = self._now_s()
            self._idle.append(connection)
        self._tell(asked, outcome, None if retry_after is None else float(retry_after[1]))

    def _tell(self, asked: _Asked, outcome: str, retry_after_s: float | None = None) -> None:
        each = Try(*asked, self._now_s(), outcome, retry_after_s)
        self._tries.append(each)
        arrival = self._again(each)
        if arrival is not None:
            again = _Asked(asked.client, asked.tries + 1, arrival.payload, arrival.at_s)
            heapq.heappush(self._due, (again.due_s, again))

    def _connection(self) -> _Connection:
        oldest_s = self._now_s() - _LONGEST_IDLE_S
        while self._idle and self._idle[0].idle_since_s < oldest_s:
            self._close(self._idle.popleft())
        if self._idle:
            return self._idle.pop()
        connection = _Connection(self._address)
        self._connections[connection.socket.fileno()] = connection
        self._poll.register(connection.socket, select.EPOLLIN)
        return connection

    def _end(self, connection: _Connection, outcome: str) -> None:
        """It is of no use any more; whoever waits for an answer gets `outcome`."""
        if connection in self._idle:
            self._idle.remove(connection)
        asked, connection.asked = connection.asked, None
        self._close(connection)
        if asked is not None:
            self._asking -= 1
            self._tell(asked, outcome)

    def _close(self, connection: _Connection) -> None:
        del self._connections[connection.socket.fileno()]
        self._poll.unregister(connection.socket)
        connection.socket.close()

    def _now_s(self) -> float:
        return time.monotonic() - self._start_s

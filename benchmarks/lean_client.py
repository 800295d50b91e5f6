"""Requests to /detect for a tenth of the CPU time that `ddetr bench` takes, which can do more: any server, TLS, keys.

Beside a server on the same two cores a client's millisecond is one that the engine does not get. Answers must have a
Content-Length, as all of `ddetr serve` have.
"""

import asyncio
import re
import socket
import time
from collections import deque
from types import TracebackType
from typing import Self, cast
from urllib.parse import urlsplit

from loadtest.client import DISCONNECTED, OK, REFUSED, TIMEOUT, Answer, error_code
from loadtest.payload import Payload

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_RETRY_AFTER = re.compile(rb"\r\nretry-after: *(\d+)", re.IGNORECASE)
_LONGEST_IDLE_S = 4.0  # uvicorn closes a connection that idles for 5 s
_SEND_BUFFER_BYTES = 1 << 20  # a request fits: sending never waits
_PATIENCE_S = 60.0


class _Connection(asyncio.Protocol):
    """One request at a time."""

    def __init__(self) -> None:
        self.idle_since_s = 0.0
        self.open = True
        self._transport: asyncio.WriteTransport | None = None
        self._answered: asyncio.Future[bytes] | None = None
        self._answer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)  # uvloop's says it is none
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)

    def ask(self, request: bytes) -> "asyncio.Future[bytes]":
        """Send; the future is the whole answer, or b"" if the connection ends before it."""
        assert self._transport is not None
        self._answer = b""
        self._answered = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return self._answered

    def data_received(self, data: bytes) -> None:
        self._answer += data
        head = self._answer.find(b"\r\n\r\n")
        if head < 0:
            return
        length = _LENGTH.search(self._answer, 0, head)
        if length is None:
            raise ValueError(f"an answer without Content-Length: {self._answer[:200]!r}")
        if len(self._answer) >= head + 4 + int(length[1]):
            self.idle_since_s = time.monotonic()
            self._end(self._answer)

    def connection_lost(self, _: Exception | None) -> None:
        self.open = False
        self._end(b"")

    def close(self) -> None:
        """Close it; who waits for an answer gets none."""
        self.open = False
        if self._transport is not None:
            self._transport.close()

    def _end(self, answer: bytes) -> None:
        if self._answered is not None and not self._answered.done():
            self._answered.set_result(answer)
        self._answered = None


class LeanClient:
    """As many connections as there are requests on their way; kept for the next. Use as an async context."""

    def __init__(self, url: str, timeout_ms: float | None = None) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80
        self._more = "" if timeout_ms is None else f"X-Timeout-Ms: {timeout_ms:g}\r\n"
        self._requests: dict[str, bytes] = {}
        self._idle: deque[_Connection] = deque()  # used longest ago first
        self._all: set[_Connection] = set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for connection in self._all:
            connection.close()

    async def detect(self, payload: Payload) -> Answer:
        """Send one picture and read the answer to its end. What goes wrong is in the answer, too."""
        try:
            connection = self._kept() or await self._connect()
        except OSError:
            return Answer(REFUSED)
        try:
            async with asyncio.timeout(_PATIENCE_S):
                answer = await connection.ask(self._request(payload))
        except TimeoutError:
            connection.close()
            self._all.discard(connection)
            return Answer(TIMEOUT)
        if not answer:
            self._all.discard(connection)
            return Answer(DISCONNECTED)
        self._idle.append(connection)
        if answer.startswith(b"HTTP/1.1 200 "):
            return Answer(OK)
        head, _, content = answer.partition(b"\r\n\r\n")
        retry_after = _RETRY_AFTER.search(head)
        outcome = f"{head[9:12].decode()} {error_code(content)}".rstrip()
        return Answer(outcome, None if retry_after is None else float(retry_after[1]))

    def _kept(self) -> _Connection | None:
        oldest_s = time.monotonic() - _LONGEST_IDLE_S
        while self._idle and (self._idle[0].idle_since_s < oldest_s or not self._idle[0].open):
            connection = self._idle.popleft()
            connection.close()
            self._all.discard(connection)
        while self._idle:
            connection = self._idle.pop()
            if connection.open:
                return connection
            self._all.discard(connection)
        return None

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(_Connection, self._host, self._port)
        self._all.add(connection)
        return connection

    def _request(self, payload: Payload) -> bytes:
        request = self._requests.get(payload.name)
        if request is None:
            head = (
                f"POST /detect HTTP/1.1\r\nHost: {self._host}:{self._port}\r\nContent-Type: {payload.media_type}\r\n"
                f"Content-Length: {len(payload.body)}\r\n{self._more}\r\n"
            )
            request = self._requests[payload.name] = head.encode() + payload.body
        return request

"""A client's connection: uvicorn's, with an end to all that uvicorn waits for without one."""

import asyncio
import fcntl
import sys
import termios
from http import HTTPStatus
from typing import ClassVar

import httptools
import orjson
from uvicorn._types import ASGI3Application, ASGIReceiveCallable, ASGISendCallable, Scope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from server import open_files
from server.observe import log_refusal
from server.respond import error_content

_JOINED_BYTES = 64 * 1024
"""Up to here a body is copied to go with its head; the system's call for a second piece costs more."""


class _Answer:
    """The transport as uvicorn sees it while it answers one request: the head waits for the body, and goes with it.

    Not for a HEAD, of which the body is never written.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._head: bytes | None = None  # b"" once it is sent
        self.is_closing = transport.is_closing

    def write(self, data: bytes) -> None:
        """Keep the head; send all else, with the head before it."""
        if self._head is None and not data.startswith(b"HTTP/1.1 100 "):
            self._head = data
        elif self._head and len(data) <= _JOINED_BYTES:
            data, self._head = self._head + data, b""
            self._transport.write(data)
        else:
            self._send_head()
            self._transport.write(data)

    def close(self) -> None:
        """Close the connection once all is sent."""
        self._send_head()
        self._transport.close()

    def _send_head(self) -> None:
        if self._head:
            self._transport.write(self._head)
            self._head = b""


class Connection(HttpToolsProtocol):
    """What the service itself never gets to see.

    - A request's line and headers come within `headers_within_s`, in `most_header_bytes`; else 408 or 431.
    - What is around a body, as the sizes of chunks and trailers are, is not longer than that and the body; else 431.
    - The rest of a body that was answered early, as all refusals are, is thrown away for as long as an idle connection
      may last; then the connection is closed. Closing at once would reset it, and with it the answer.
    - Who asks first whether to send the body (`Expect: 100-continue`), and is refused, may or may not send it: what
      comes next cannot be told from a request, so the connection ends with the answer.
    - An answer that the client reads more slowly than `least_bytes_per_s` is not kept; it is looked at as often as an
      idle connection may last.
    - Who would rather go on in another protocol, as Java's client would in HTTP/2, is answered in this one.
    - Where so many are open that files run out, a new one is closed at once.
    """

    headers_within_s: ClassVar[float] = 10.0
    most_header_bytes: ClassVar[int] = 64 * 1024
    least_bytes_per_s: ClassVar[int] = 32 * 1024

    _answered: RequestResponseCycle | None = None  # just now; uvicorn's `cycle` is the newest, which may have to wait
    _in_headers = False  # or before them
    _headers_timer: asyncio.TimerHandle | None = None
    _answer_timer: asyncio.TimerHandle | None = None
    _message_begun = False  # and not complete
    _piece_bytes = 0  # of what was just received
    _header_bytes = 0  # if they came in several pieces
    _body_bytes = 0
    _bytes_around = 0
    _upgrade_at: int | None = None  # in the data just parsed: what follows a head that asks for another protocol

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        if open_files.run_out(transport.get_extra_info("socket").fileno()):
            transport.abort()
            return
        self._in_headers = True
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting for anything."""
        self._headers_are_here()
        if self._answer_timer is not None:
            self._answer_timer.cancel()
        super().connection_lost(exc)
        if self._answered is not None and not self._answered.response_complete:
            self._answered.disconnected = True
            self._answered.message_event.set()

    def data_received(self, data: bytes) -> None:
        """Take in a piece of a request, of the rest of one, or of several."""
        self._piece_bytes = len(data)
        begun, cycle = self._message_begun, self.cycle
        if begun and self._in_headers:
            self._header_bytes += len(data)
        elif begun:
            self._bytes_around += len(data)  # less those of the body, when it is known which these are
        self._parse(data)
        if self._message_begun and self._in_headers:
            if not begun and self.cycle is cycle:  # nothing else is in the piece
                self._header_bytes = len(data)
            if self._headers_timer is None:  # most requests' headers come at once
                self._await_headers()
            if self._header_bytes > self.most_header_bytes:
                self._refuse(431, "too_many_header_bytes", f"more than {self.most_header_bytes} bytes of headers")
        elif self._message_begun:
            most = self.most_header_bytes + self._body_bytes
            if self._bytes_around > most:
                message = f"{self._bytes_around} bytes around {self._body_bytes} of body"
                self._refuse(431, "too_many_header_bytes", message, in_body=True)
        elif self._is_idle() and self.timeout_keep_alive_task is None and not self.transport.is_closing():
            # uvicorn sets this timer at an answer, and any byte ends it: even one that begins no request.
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def on_message_begin(self) -> None:
        """The first byte of a request is here."""
        self._message_begun = True
        super()._unset_keepalive_if_required()
        if not self._in_headers:
            self._in_headers, self._header_bytes = True, 0
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header; trailers are nothing to the service, and would be added to the headers."""
        if self._in_headers:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The request can be answered."""
        if self._asks_for_upgrade():
            return
        self._headers_are_here()
        self._body_bytes = self._bytes_around = 0
        if (self._header_bytes or self._piece_bytes > self.most_header_bytes) and self._is_head_too_long():
            self.app = self._refuse_head  # in its turn; and nothing comes after it
        super().on_headers_complete()
        if self.scope["method"] != "HEAD":
            self.cycle.transport = _Answer(self.transport)  # type: ignore[assignment]
        if self.expect_100_continue:
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        self._body_bytes += len(body)
        self._bytes_around -= len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The body has come whole."""
        if self._asks_for_upgrade():
            return
        self._message_begun = False
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """The answer is written, or waits to be read by the client."""
        super().on_response_complete()
        self._watch_answer()

    def pause_writing(self) -> None:
        """An answer in pieces waits for the client to read."""
        super().pause_writing()
        self._watch_answer()

    def resume_writing(self) -> None:
        """The client has read; what comes next is watched when it waits again, or is whole."""
        if self._answer_timer is not None and self._is_answering():
            self._answer_timer.cancel()
            self._answer_timer = None
        super().resume_writing()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._answered = cycle
        super()._start_asgi_task(cycle, app)

    def _parse(self, data: bytes) -> None:
        """The parser takes all behind a head with `Upgrade` for the other protocol: it is told the head without it."""
        rest = memoryview(data)
        while rest:
            self._upgrade_at = None
            super().data_received(rest)  # type: ignore[arg-type]
            if self._upgrade_at is None:
                return
            rest = rest[self._upgrade_at :]
            lines = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())]
            lines += [b"%s: %s" % header for header in self.headers if header[0] != b"upgrade"]
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's own
            super().data_received(b"\r\n".join([*lines, b"\r\n"]))

    def _asks_for_upgrade(self) -> bool:
        return self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT"

    def _unsupported_upgrade_warning(self) -> None:
        # Called by uvicorn where it handles the parser's exception.
        error = sys.exception()
        if isinstance(error, httptools.HttpParserUpgrade) and self._asks_for_upgrade():
            self._upgrade_at = error.args[0]

    def _unset_keepalive_if_required(self) -> None:
        # The rest of a body that nobody wants keeps no connection open.
        if not self._message_begun or self._in_headers or self._is_answering():
            super()._unset_keepalive_if_required()

    def _is_idle(self) -> bool:
        return not self._message_begun and not self._is_answering()

    def _is_answering(self) -> bool:
        cycle: RequestResponseCycle | None = self.cycle  # None before the first request
        return cycle is not None and not cycle.response_complete

    def _await_headers(self) -> None:
        self._headers_timer = self.loop.call_later(self.headers_within_s, self._headers_are_late)

    def _headers_are_here(self) -> None:
        self._in_headers = False
        if self._headers_timer is not None:
            self._headers_timer.cancel()
            self._headers_timer = None

    def _headers_are_late(self) -> None:
        self._headers_timer = None
        if self._is_answering():
            self._await_headers()  # of a further request, which may have to wait
        elif self._message_begun:
            self._refuse(408, "headers_timeout", f"the headers did not come within {self.headers_within_s:g} s")
        else:
            self.transport.close()

    def _is_head_too_long(self) -> bool:
        # Without the line's method and version, and the spaces around values.
        return len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers) > self.most_header_bytes

    async def _refuse_head(self, _scope: Scope, _receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        """The application for a request whose head is too long."""
        message = f"more than {self.most_header_bytes} bytes of headers"
        content = orjson.dumps(error_content("too_many_header_bytes", message))
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(content)).encode()),
            (b"connection", b"close"),
        ]
        await send({"type": "http.response.start", "status": 431, "headers": headers})
        await send({"type": "http.response.body", "body": content})
        log_refusal(self.client, 431, "too_many_header_bytes")

    def _watch_answer(self) -> None:
        if self._answer_timer is not None:
            self._answer_timer.cancel()
            self._answer_timer = None
        if self.transport.get_write_buffer_size():
            self._answer_timer = self.loop.call_later(self.timeout_keep_alive, self._check_answer, self._unread_bytes())

    def _check_answer(self, unread_bytes: int) -> None:
        self._answer_timer = None
        least = self.least_bytes_per_s * self.timeout_keep_alive
        if self.transport.get_write_buffer_size() and self._unread_bytes() > unread_bytes - least:
            self.transport.abort()
        else:
            self._watch_answer()

    def _unread_bytes(self) -> int:
        """Bytes of the answer, here and with the kernel: for seconds it takes none from here while a client reads."""
        here = self.transport.get_write_buffer_size()
        try:
            queued = fcntl.ioctl(self.transport.get_extra_info("socket"), termios.TIOCOUTQ, bytes(4))
        except OSError:  # only Linux tells
            return here
        return here + int.from_bytes(queued, sys.byteorder)

    def _refuse(self, status: int, code: str, message: str, in_body: bool = False) -> None:
        """Answer what never became a request, and end the connection."""
        self._headers_are_here()
        if self.transport.is_closing():
            return
        if self.pipeline or self.cycle.response_started if in_body else self._is_answering():
            self.transport.abort()  # there is no place for a second answer
            return
        content = orjson.dumps(error_content(code, message))
        head = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(content)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + content)
        self.transport.close()
        log_refusal(self.client, status, code)

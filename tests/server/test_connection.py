"""Connections over a real socket, written byte by byte."""

import asyncio
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, ClassVar

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from server.connection import Connection

KEEP_ALIVE_S = 0.6


class Hasty(Connection):
    headers_within_s = 0.6
    most_header_bytes = 2000
    least_bytes_per_s = 300_000


async def application(scope: Scope, receive: Receive, send: Send) -> None:
    """/read answers with the number of bytes in the body, /refuse before it has read any, /large with very many.

    /fail ends after the head, /pieces sends a body in three, /wait waits until the client has left.
    """
    if scope["path"] == "/wait":
        while (await receive())["type"] != "http.disconnect":
            pass
        Recorded.left.set()
        return
    size = 0
    if scope["path"] == "/read":
        while True:
            message = await receive()
            size += len(message.get("body", b""))
            if not message.get("more_body"):
                break
    content = bytes(50_000_000) if scope["path"] in {"/large", "/stream"} else str(size).encode()
    headers = [(b"content-length", str(len(content)).encode())]
    await send(
        {"type": "http.response.start", "status": 503 if scope["path"] == "/refuse" else 200, "headers": headers}
    )
    if scope["path"] == "/fail":
        return
    if scope["path"] == "/stream":
        for _ in range(100):
            await send({"type": "http.response.body", "body": bytes(500_000), "more_body": True})
        content = b""
    if scope["path"] == "/pieces":
        await send({"type": "http.response.body", "body": b"", "more_body": True})
        await send({"type": "http.response.body", "body": content[:1], "more_body": True})
        content = content[1:]
    await send({"type": "http.response.body", "body": content})


class Writes:
    """A transport, and what was written to it."""

    def __init__(self, transport: asyncio.Transport, written: list[bytes]) -> None:
        self._transport = transport
        self._written = written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        self._written.append(data)
        self._transport.write(data)


class Recorded(Hasty):
    written: ClassVar[list[bytes]] = []
    left: ClassVar[asyncio.Event]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(Writes(transport, self.written))  # type: ignore[arg-type]


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def send(self, *lines: str, body: bytes = b"") -> None:
        """Send lines, of which an empty one ends a head, and a body."""
        self._writer.write("\r\n".join([*lines, ""]).encode() + body)
        await self._writer.drain()

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body."""
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode().splitlines()
        headers = dict(line.lower().split(": ") for line in head[1:] if line)
        return int(head[0].split()[1]), headers, await self._reader.readexactly(int(headers["content-length"]))

    async def closed(self) -> bytes:
        """Wait until the server closes the connection; what came before that."""
        rest = b""
        with suppress(ConnectionError):
            while data := await self._reader.read(1 << 20):
                rest += data
        return rest

    def close(self) -> None:
        self._writer.close()


class Listener(uvicorn.Server):
    @asynccontextmanager
    async def running(self) -> AsyncIterator[int]:
        self.config.load()
        self.lifespan = self.config.lifespan_class(self.config)
        await self.startup()
        try:
            yield self.servers[0].sockets[0].getsockname()[1]
        finally:
            self.should_exit = True
            await self.shutdown()


def run(test: Callable[[Callable[[], Awaitable[Client]]], Awaitable[None]]) -> None:
    Recorded.written.clear()

    async def body() -> None:
        Recorded.left = asyncio.Event()
        config = uvicorn.Config(
            application,
            host="127.0.0.1",
            port=0,
            http=Recorded,
            ws="none",
            lifespan="off",
            log_config=None,
            timeout_keep_alive=KEEP_ALIVE_S,  # type: ignore[arg-type]
            timeout_graceful_shutdown=1,
        )
        async with asyncio.timeout(20), Listener(config).running() as port:
            clients: list[Client] = []

            async def connect() -> Client:
                clients.append(Client(*await asyncio.open_connection("127.0.0.1", port, limit=1 << 16)))
                return clients[-1]

            try:
                await test(connect)
            finally:
                for client in clients:
                    client.close()

    asyncio.run(body())


HOST = "Host: here"


def test_requests_follow_one_another() -> None:
    async def test(connect: Callable[[], Awaitable[Client]]) -> None:
        client = await connect()
        for size in (3, 300_000):
            await client.send("POST /read HTTP/1.1", HOST, f"Content-Length: {size}", "", body=bytes(size))
            assert await client.answer() == (200, {"content-length": str(len(str(size)))}, str(size).encode())
        assert await client.closed() == b""

    run(test)


def test_a_connection_without_a_request_is_closed() -> None:
    async def test(connect: Callable[[], Awaitable[Client]]) -> None:
        assert await (await connect()).closed() == b""

    run(test)


def test_slow_headers_are_408() -> None:
    async def test(connect: Callable[[], Awaitable[Client]]) -> None:
        client = await connect()
        await client.send("POST /read HTTP/1.1", HOST)

        async def trickle() -> None:
            while True:
                await client.send("X-A: b")
                await asyncio.sleep(0.05)

        trickling = asyncio.create_task(trickle())
        status, headers, content = await client.answer()
        trickling.cancel()
        assert (status, headers["connection"]) == (408, "close")
        assert b"headers_timeout" in content
        assert b"0.6 s" in content

    run(test)


def test_slow_headers_of_a_second_request_are_408_too() -> None:
    async def test(connect: Callable[[], Awaitable[Client]]) -> None:
        client = await connect()
        await client.send("POST /read HTTP/1.1", HOST, "Content-Length: 0", "")
        assert (await client.answer())[0] == 200
        await client.send("POST /read HTTP/1.1")
        assert (await client.answer())[0] == 408

    run(test)


def test_headers_without_end_are_431_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def test(connect: Callable[[], Awaitable[Client]]) -> None:
        client = await connect()
        await client.send("POST /read HTTP/1.1", HOST)
        await asyncio.sleep(0.05)
        await client.send("X-A: " + "b" * 2100)
        status, headers, content = await client.answer()
        assert (status, headers["connection"]) == (431, "close")
        assert b"2000" in content

    run(test)
    (record,) = [record for record in caplog.records if record.name == "ddetr.access"]
    assert record.__dict__["fields"] == {"client": "127.0.0.1", "status": 431, "error": "too_many_header_bytes"}


LONG = "X-A: " + "b" * 2100


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize("before", ["nothing", "another request", "another request in the same piece"])
def test_a_long_head_in_one_piece_is_431(before: str, ended: bool) -> None:
    async def test(connect: Callable[[], Awaitable[Client]]) -> None:
        client = await connect()
        another = ["GET /read HTTP/1.1", HOST, ""] if before != "nothing" else []
        if before == "another request":
            await client.send(*another)
            assert (await client.answer())[0] == 200
            another = []
        end = ["Content-Length: 9", ""] if ended else []
        await client.send(*another, "POST /read HTTP/1.1", HOST, LONG, *end, body=b"123456789" if ended else b"")
        if another:
            assert (await client.answer())[0] == 200
            if not ended:  # how much of the piece is the other's is not known: the next one tells
                await client.send(LONG)
        status, headers, content = await client.answer()
        assert (status, headers["connection"]) == (431, "close")
        assert b"more than 2000" in content
        assert await client.closed() == b""

    run(test)


def test_a_long_head_of_short_headers_in_several_pieces_is_431() -> None:
    async def test(connect: Callable[[], Awaitable[Client]]) -> None:
        client = await connect()
        await client.send("GET /read HTTP/1.1", HOST, *["A: b"] * 200)
        await asyncio.sleep(0.05)
        await client.send(*["A: b"] * 200, "")
        assert (await client.answer())[0] == 431

    run(test)


def test_a_body_in_one_piece_with_its_head_is_not_counted_with_it() -> None:
    async def test(connect: Callable[[], Awaitable[Client]]) -> None:
        client = await connect()
        for _ in range(2):
            await client.send("POST /read HTTP/1.1", HOST, "Content-Length: 60000", "", body=bytes(60_000))
            assert (await client.answer())[2] == b"60000"
        await client.send("POST /read HTTP/1.1", "X-A: " + "b" * 1500)
        await asyncio.sleep(0.05)
        await client.send(HOST, "Content-Length: 60000", "", body=bytes(60_000))
        assert (await client.answer())[2] == b"60000"

    run(test)


def test_after_an_early_answer_the_rest_of_the_body_is_thrown_away_and_the_connection_goes_on() -> None:
    async def test(connect: Callable[[], Awaitable[Client]]) -> None:
        client = await connect()
        await client.send("POST /refuse HTTP/1.1", HOST, "Content-Length: 1000000", "", body=bytes(10))
        assert (await client.answer())[0] == 503
        await client.send(body=bytes(999_990))
        await client.send("POST /read HTTP/1.1", HOST, "Content-Length: 3", "", body=b"abc")
        assert await client.answer() == (200, {"content-length": "1"}, b"3")
        assert await client.closed() == b""  # when it has been idle

    run(test)


@pytest.mark.parametrize("framing", ["Content-Length: 1000000", "Transfer-Encoding: chunked"])
def test_a_body_that_trickles_after_an_early_answer_keeps_no_connection(framing: str) -> None:
    async def test(connect: Callable[[], Awaitable[Client]]) -> None:
        client = await connect()
        await client.send("POST /refuse HTTP/1.1", HOST, framing, "")
        assert (await client.answer())[0] == 503

        async def trickle() -> None:
            with suppress(ConnectionError):
                while True:
                    await client.send("1", "x")
                    await asyncio.sleep(0.02)

        trickling = asyncio.create_task(trickle())
        assert await client.closed() == b""
        trickling.cancel()

    run(test)


def test_who_asks_before_sending_is_refused_with_the_connection_closed() -> None:
    async def test(connect: Callable[[], Awaitable[Client]]) -> None:
        client = await connect()
        await client.send("POST /refuse HTTP/1.1", HOST, "Content-Length: 9", "Expect: 100-continue", "")
        status, headers, _ = await client.answer()
        assert (status, headers["connection"]) == (503, "close")
        assert await client.closed() == b""

    run(test)


def test_who_asks_before_sending_is_told_to_go_on() -> None:
    async def test(connect: Callable[[], Awaitable[Client]]) -> None:
        client = await connect()
        await client.send("POST /read HTTP/1.1", HOST, "Content-Length: 9", "Expect: 100-continue", "")
        assert await client._reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        await client.send(body=b"123456789")
        assert (await client.answer())[2] == b"9"

    run(test)


UPGRADE = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAEAAEAAAAIAAAAB")


@pytest.mark.parametrize("framing", ["Content-Length: 3", "Transfer-Encoding: chunked"])
def test_who_would_rather_have_another_protocol_is_answered_in_this_one(framing: str) -> None:
    content = b"abc" if framing.startswith("Content") else b"3\r\nabc\r\n0\r\n\r\n"

    async def test(connect: Callable[[], Awaitable[Client]]) -> None:
        client = await connect()
        for _ in range(2):
            await client.send("POST /read HTTP/1.1", HOST, *UPGRADE, framing, "", body=content)
        assert [(await client.answer())[2] for _ in range(2)] == [b"3", b"3"]
        await client.send("POST /read HTTP/1.1", HOST, *UPGRADE[:2])
        await asyncio.sleep(0.05)
        await client.send(UPGRADE[2], framing, "")
        await asyncio.sleep(0.05)
        await client.send(body=content)
        assert (await client.answer())[2] == b"3"
        await client.send("GET /read HTTP/1.1", HOST, *UPGRADE, "")
        await client.send("POST /read HTTP/1.1", HOST, framing, "", body=content)
        assert [(await client.answer())[2] for _ in range(2)] == [b"0", b"3"]
        assert await client.closed() == b""  # when it has been idle

    run(test)


def test_very_many_wishes_for_another_protocol_in_one_piece_are_answered() -> None:
    async def test(connect: Callable[[], Awaitable[Client]]) -> None:
        client = await connect()
        head = "\r\n".join(["GET /read HTTP/1.1", *UPGRADE, "", ""]).encode()
        client._writer.write(head * 1500)
        assert [(await client.answer())[2] for _ in range(1500)] == [b"0"] * 1500

    run(test)


def test_a_tunnel_is_refused() -> None:
    async def test(connect: Callable[[], Awaitable[Client]]) -> None:
        client = await connect()
        await client.send("CONNECT there:443 HTTP/1.1", HOST, *UPGRADE, "")
        assert (await client.closed()).startswith(b"HTTP/1.1 400 ")

    run(test)


def test_line_breaks_between_requests_keep_no_connection() -> None:
    async def test(connect: Callable[[], Awaitable[Client]]) -> None:
        client = await connect()
        await client.send("POST /read HTTP/1.1", HOST, "Content-Length: 0", "")
        assert (await client.answer())[0] == 200
        await client.send("")
        assert await client.closed() == b""

    run(test)


@pytest.mark.parametrize("path", ["/large", "/stream"])
def test_an_answer_that_nobody_reads_is_not_kept(path: str) -> None:
    async def test(connect: Callable[[], Awaitable[Client]]) -> None:
        client = await connect()
        await client.send(f"POST {path} HTTP/1.1", HOST, "Content-Length: 0", "")
        await asyncio.sleep(3 * KEEP_ALIVE_S)
        assert len(await client.closed()) < 50_000_000

    run(test)


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel what is unread")
@pytest.mark.parametrize(("pause_s", "kept"), [(0.03, True), (0.15, False)])
def test_an_answer_that_is_read_slowly_is_kept_above_a_least_pace(pause_s: float, kept: bool) -> None:
    async def test(connect: Callable[[], Awaitable[Client]]) -> None:
        client = await connect()
        loop = asyncio.get_running_loop()
        # A stream would read ahead, and then nothing for a while.
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32768)  # few bytes at a time are told to be read
            connection.setblocking(False)
            await loop.sock_connect(connection, client._writer.get_extra_info("peername"))
            await loop.sock_sendall(connection, b"GET /large HTTP/1.1\r\n\r\n")
            size = 0
            until_s = loop.time() + 5 * KEEP_ALIVE_S
            with suppress(ConnectionError):
                while data := await loop.sock_recv(connection, 30_000 if loop.time() < until_s else 1 << 20):
                    size += len(data)
                    await asyncio.sleep(pause_s if loop.time() < until_s else 0)
        assert (size > 50_000_000) == kept

    run(test)


def test_requests_that_are_sent_ahead_get_their_answers_in_order() -> None:
    async def test(connect: Callable[[], Awaitable[Client]]) -> None:
        client = await connect()
        for size in range(5):
            await client.send("POST /read HTTP/1.1", HOST, f"Content-Length: {size}", "", body=bytes(size))
        assert [(await client.answer())[2] for _ in range(5)] == [str(size).encode() for size in range(5)]

    run(test)


@pytest.mark.parametrize("ahead", [0, 2])
def test_a_request_is_told_that_its_client_left_whatever_was_sent_behind_it(ahead: int) -> None:
    async def test(connect: Callable[[], Awaitable[Client]]) -> None:
        client = await connect()
        await client.send("GET /wait HTTP/1.1", HOST, "", *["GET /read HTTP/1.1", HOST, ""] * ahead)
        await asyncio.sleep(0.05)
        client.close()
        async with asyncio.timeout(5):
            await Recorded.left.wait()

    run(test)


def test_an_answer_is_one_write() -> None:
    async def test(connect: Callable[[], Awaitable[Client]]) -> None:
        client = await connect()
        for _ in range(2):
            await client.send("POST /read HTTP/1.1", HOST, "Content-Length: 0", "")
            await client.answer()
        assert len(Recorded.written) == 2

    run(test)


def test_a_body_in_pieces_comes_whole() -> None:
    async def test(connect: Callable[[], Awaitable[Client]]) -> None:
        client = await connect()
        await client.send("GET /pieces HTTP/1.1", HOST, "")
        assert (await client.answer())[2] == b"0"

    run(test)


def test_a_head_alone_is_sent_too() -> None:
    async def test(connect: Callable[[], Awaitable[Client]]) -> None:
        client = await connect()
        for _ in range(2):
            await client.send("HEAD /read HTTP/1.1", HOST, "")
            assert (await client._reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
        await client.send("GET /fail HTTP/1.1", HOST, "")
        assert (await client.closed()).startswith(b"HTTP/1.1 200 ")

    run(test)

"""The client against a real HTTP server that answers what it is told to."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from loadtest.client import DISCONNECTED, OK, REFUSED, TIMEOUT, Client, Target, error_code, server_timing
from loadtest.payload import Payload

PAYLOAD = Payload("a", b"picture", "image/jpeg")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def site(handler: Handler) -> AsyncIterator[str]:
    app = web.Application(client_max_size=2**26)
    app.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    listener = web.TCPSite(runner, "127.0.0.1", 0)
    await listener.start()
    try:
        host, port = runner.addresses[0][:2]
        yield f"http://{host}:{port}"
    finally:
        await runner.cleanup()


async def nothing(request: web.Request) -> web.Response:
    return web.Response()


def detected(handler: Handler, payload: Payload = PAYLOAD, **options: Any) -> Any:
    """The answer to one request."""
    api_key = options.pop("api_key", None)

    async def main() -> Any:
        async with site(handler) as url, Client(Target(url, api_key), connections=2, **options) as client:
            return await client.detect(payload)

    return asyncio.run(main())


def test_what_is_sent() -> None:
    seen: dict[str, Any] = {}

    async def handler(request: web.Request) -> web.Response:
        seen.update(path=request.path, body=await request.read(), headers=request.headers.copy())
        return web.Response(headers={"Server-Timing": "decode;dur=1.5, queue;dur=2"})

    answer = detected(handler, api_key="secret", timeout_ms=250, priority="batch")
    assert (answer.outcome, answer.stages_ms) == (OK, {"decode": 1.5, "queue": 2.0})
    assert (seen["path"], seen["body"]) == ("/detect", b"picture")
    headers = seen["headers"]
    assert headers["Content-Type"] == "image/jpeg"
    assert headers["Authorization"] == "Bearer secret"
    assert headers["X-Timeout-Ms"] == "250"
    assert headers["X-Priority"] == "batch"


def test_without_options_no_header_is_added() -> None:
    seen: list[str] = []

    async def handler(request: web.Request) -> web.Response:
        seen.extend(request.headers)
        return web.Response()

    detected(handler)
    assert not {"Authorization", "X-Timeout-Ms", "X-Priority"} & set(seen)


def test_a_large_picture_is_sent_whole() -> None:
    sizes: list[int] = []

    async def handler(request: web.Request) -> web.Response:
        sizes.append(len(await request.read()))
        return web.Response()

    assert detected(handler, Payload("large", bytes(3_000_000), "image/png")).outcome == OK
    assert sizes == [3_000_000]


def test_an_error_is_named_by_status_and_code() -> None:
    async def full(request: web.Request) -> web.Response:
        return web.json_response(
            {"error": {"code": "queue_full", "message": ""}}, status=429, headers={"Retry-After": "3"}
        )

    answer = detected(full)
    assert (answer.outcome, answer.retry_after_s) == ("429 queue_full", 3.0)


def test_an_error_of_another_server_is_named_by_its_status() -> None:
    async def broken(request: web.Request) -> web.Response:
        return web.Response(status=502, text="Bad Gateway", headers={"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"})

    answer = detected(broken)
    assert (answer.outcome, answer.retry_after_s) == ("502", None)


def test_nobody_there_is_refused() -> None:
    async def main() -> str:
        async with site(nothing) as url:
            pass
        async with Client(Target(url), connections=1) as client:
            return (await client.detect(PAYLOAD)).outcome

    assert asyncio.run(main()) == REFUSED


def test_a_connection_that_is_cut_is_disconnected() -> None:
    async def cut(request: web.Request) -> web.Response:
        assert request.transport is not None
        request.transport.close()
        return web.Response()

    assert detected(cut).outcome == DISCONNECTED


def test_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loadtest.client._MARGIN_S", 0.0)

    async def hang(request: web.Request) -> web.Response:
        await asyncio.sleep(30)
        return web.Response()

    assert detected(hang, timeout_ms=100).outcome == TIMEOUT


def test_metrics_are_read_with_the_key_and_may_be_missing() -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.Response(text=request.headers["Authorization"], status=200 if request.path == "/metrics" else 404)

    async def main() -> list[str | None]:
        async with site(handler) as url:
            found = []
            for target in (
                Target(url, "k"),
                Target(url, "k", f"{url}/elsewhere"),
                Target(url, "k", "http://127.0.0.1:1"),
            ):
                async with Client(target, connections=1) as client:
                    found.append(await client.metrics())
            return found

    assert asyncio.run(main()) == ["Bearer k", None, None]


@pytest.mark.parametrize(
    ("header", "stages"),
    [
        ("", {}),
        ("decode;dur=3.80, queue;dur=0", {"decode": 3.8, "queue": 0.0}),
        ('cache;desc="hit";dur=2.5,miss, odd;dur=soon', {"cache": 2.5}),
    ],
)
def test_server_timing(header: str, stages: dict[str, float]) -> None:
    assert server_timing(header) == stages


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b'{"error": "text"}', b'{"error": {"code": 5}}', b"<html>"])
def test_an_answer_without_a_code_has_none(content: bytes) -> None:
    assert error_code(content) == ""

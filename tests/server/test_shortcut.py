import asyncio
import gc
import weakref
from contextlib import suppress
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import Receive, Scope, Send

from server.errors import BadParameter, ClientGone, ServiceError
from server.routes import while_connected
from server.shortcut import Shortcut


async def around(scope: Scope, receive: Receive, send: Send) -> None:
    await PlainTextResponse("around")(scope, receive, send)


async def explain(request: Request, error: ServiceError) -> Response:
    return PlainTextResponse(f"{request.url.path}: {error.message}", error.status)


def ask(scope: dict[str, Any], error: Exception | None = None) -> tuple[int, bytes]:
    """Status and body of the answer to a request of `scope`."""

    async def endpoint(request: Request) -> Response:
        if error is not None:
            raise error
        return PlainTextResponse(f"straight {request.method}")

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError("nobody reads the body here")

    http = {"type": "http", "method": "POST", "path": "/detect", "headers": [], "query_string": b""}
    asyncio.run(Shortcut(around, "/detect", endpoint, explain)(http | scope, receive, send))
    return sent[0]["status"], sent[1]["body"]


def test_a_post_to_the_path_goes_straight() -> None:
    assert ask({}) == (200, b"straight POST")
    assert ask({"path": "/below/detect", "root_path": "/below"}) == (200, b"straight POST")


@pytest.mark.parametrize("scope", [{"method": "GET"}, {"path": "/detect/"}, {"path": "/model"}, {"method": "OPTIONS"}])
def test_everything_else_goes_around(scope: dict[str, Any]) -> None:
    assert ask(scope) == (200, b"around")


def test_errors_of_ours_are_explained_and_others_go_on() -> None:
    assert ask({}, BadParameter("threshold: 7")) == (400, b"/detect: threshold: 7")
    with pytest.raises(ZeroDivisionError):
        ask({}, ZeroDivisionError())


def test_what_a_refused_request_held_is_free_at_once() -> None:
    uploads: list[weakref.ref[Any]] = []

    class Upload:
        pass

    async def endpoint(request: Request) -> Response:
        upload, error = Upload(), BadParameter("no picture")
        uploads.append(weakref.ref(upload))
        raise error

    async def receive() -> Any:
        raise AssertionError("nobody reads the body here")

    async def send(message: Any) -> None:
        pass

    scope = {"type": "http", "method": "POST", "path": "/detect", "headers": [], "query_string": b""}
    gc.disable()
    try:
        asyncio.run(Shortcut(around, "/detect", endpoint, explain)(scope, receive, send))
        assert uploads[0]() is None
    finally:
        gc.enable()


class Client:
    """Stays until `leave`."""

    def __init__(self) -> None:
        self._left = asyncio.Event()
        self.leave = self._left.set

    async def receive(self) -> Any:
        await self._left.wait()
        return {"type": "http.disconnect"}


def test_who_stays_gets_the_result() -> None:
    async def main() -> None:
        client = Client()
        assert await while_connected(client.receive, asyncio.sleep(0, "result")) == "result"
        client.leave()  # later: nobody is cancelled for it
        await asyncio.sleep(0.01)

    asyncio.run(main())


def test_work_ends_when_the_client_leaves() -> None:
    async def main() -> None:
        client, ended = Client(), asyncio.Event()

        async def work() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()

        asyncio.get_running_loop().call_later(0.01, client.leave)
        async with asyncio.timeout(60):
            with pytest.raises(ClientGone):
                await while_connected(client.receive, work())
            assert ended.is_set()
            await asyncio.sleep(0)  # nothing of the cancelling is left

    asyncio.run(main())


def test_a_client_that_leaves_with_the_answer_on_its_way_cancels_nobody_else() -> None:
    async def main() -> None:
        client = Client()

        async def work() -> str:
            await asyncio.sleep(0)
            client.leave()
            return "result"

        with suppress(ClientGone):
            assert await while_connected(client.receive, work()) == "result"
        for _ in range(3):
            await asyncio.sleep(0)

    asyncio.run(main())


@pytest.mark.parametrize("leaves", [False, True])
def test_a_deadline_is_a_deadline_whether_or_not_the_client_leaves_too(leaves: bool) -> None:
    async def main() -> None:
        client = Client()

        async def late() -> None:
            async with asyncio.timeout(60) as deadline:
                deadline.reschedule(asyncio.get_running_loop().time())
                if leaves:
                    client.leave()
                await while_connected(client.receive, asyncio.Event().wait())

        with pytest.raises(TimeoutError):
            await late()

    asyncio.run(main())


def test_errors_of_the_work_are_raised() -> None:
    async def fail() -> None:
        raise ZeroDivisionError

    async def main() -> None:
        with pytest.raises(ZeroDivisionError):
            await while_connected(Client().receive, fail())

    asyncio.run(main())
